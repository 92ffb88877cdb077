"""Key store on many processes, with the same answers as on one process."""

from munkey.sharded.ranks import Ranks
from munkey.sharded.store import ShardedKeyStore

__all__ = ["Ranks", "ShardedKeyStore"]

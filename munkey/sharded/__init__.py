"""A key store on many processes, with the answers of one."""

from munkey.sharded.ranks import Ranks
from munkey.sharded.store import ShardedKeyStore

__all__ = ["Ranks", "ShardedKeyStore"]

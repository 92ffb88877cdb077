"""The store: one table of rows, and its followers."""

from munkey.store.durable import DurableStore
from munkey.store.follower import Follower
from munkey.store.log import ReceiptLog, verify
from munkey.store.receipts import Receipt
from munkey.store.schema import Rows
from munkey.store.store import KeyStore

__all__ = ["DurableStore", "Follower", "KeyStore", "Receipt", "ReceiptLog", "Rows", "verify"]

"""Search for nearest keys: exact, with faiss, or custom."""

from munkey.search.exact import Neighbours, Search, Searchable, exact
from munkey.search.faiss import FaissSearch

__all__ = ["FaissSearch", "Neighbours", "Search", "Searchable", "exact"]

"""Exact search for nearest keys."""

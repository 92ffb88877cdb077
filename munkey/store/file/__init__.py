"""File of a store, whole at every moment, also after a failure of process, power or disk."""

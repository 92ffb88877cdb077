"""The file of a store: kept whole at every moment, whatever happens to process, power and disk."""

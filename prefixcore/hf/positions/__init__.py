"""Positions, and what else a model is told of every token: the cache, the table of positions, types of tokens."""

"""Continuous batching (`generate_batch`) of an attached model: virtual tokens in the pages of transformers' cache.

A request there is a list of ids, and neither embeddings nor keys and values can be handed over. So virtual tokens are
ids behind the vocabulary, before the text of each request (`ids`): where the model embeds them, a soft prompt's rows
stand, and where a layer's keys and values go into the cache, a prefix's do. The cache then has them as tokens like
any others, and shares whole pages of equal ones among requests.

It runs on a copy of the model without anything attached, which has the same weights (`bare_copy`).
"""

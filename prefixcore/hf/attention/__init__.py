"""Reaching attention: the function that transformers calls, which layers reach it, the mask, the prefixes of a call."""

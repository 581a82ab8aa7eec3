"""The demo: a real language model learns countries and their capitals through a few virtual tokens."""

"""One module a backend, of one form (`protocol.py`); none imports another. `prefixcore.ops.select` chooses."""

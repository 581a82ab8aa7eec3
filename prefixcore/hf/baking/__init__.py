"""Adapters in another form: a soft prompt or a text as a prefix, and the formats of others."""

"""The demo of `prefixcore distill`: three texts of different kinds as prefixes of a twelfth of their tokens."""

"""Soft prompts in the input of a call: before the text, anywhere in it, or in a packed batch."""

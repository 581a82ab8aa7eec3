"""Serving learned prompts on a real server: the demo, and what it costs beside other ways of doing it."""

"""What stops a server before it serves."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """vLLM cannot be started, or has ended by itself; the message says why and how to mend it."""


class NotInstalledError(LaunchError):
    """A Python has no vLLM."""

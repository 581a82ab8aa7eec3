"""Greedy generation on attached models."""

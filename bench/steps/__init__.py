"""Whole training steps of transformers models."""

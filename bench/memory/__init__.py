"""Bytes saved for the backward, and peak resident memory."""

"""The two ops beside what people run today."""

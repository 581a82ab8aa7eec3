"""What is attached to a model: a bank of adapters, of which each row of a batch sees its own, or none."""

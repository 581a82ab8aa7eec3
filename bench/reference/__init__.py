"""What people run today, each in a file of its own that reads top to bottom. None imports another."""

"""What is learned, on real models and data: each method beside the baseline that costs nothing."""

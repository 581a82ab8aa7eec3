"""One module a backend; none imports another. ``prefixcore.ops.select`` chooses between them."""

"""A model as it is: where it computes, its methods and their wrapping, what the running thread is inside of."""

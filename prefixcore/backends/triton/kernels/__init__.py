"""The Triton kernels. To import one of these modules is to import Triton; nothing else in prefixcore does."""

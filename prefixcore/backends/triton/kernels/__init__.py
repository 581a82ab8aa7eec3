"""The GPU backend's Triton kernels. Importing a module of this room imports Triton; nothing else does."""

"""The two functional ops, their references and the choice of backend."""

from .prefix_attention import prefix_attention
from .select import explain, use_backend, which_backend
from .soft_embedding import soft_embedding

__all__ = ["explain", "prefix_attention", "soft_embedding", "use_backend", "which_backend"]

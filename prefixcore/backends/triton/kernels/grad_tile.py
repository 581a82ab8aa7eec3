"""What one tile of queries gives to the gradients of one tile of keys and values, of a sequence or a prefix.

With p and dS as in `grad_query`, transposed (Dao et al., arXiv:2205.14135, appendix B.2):
    dV = p^T dO,  dK = scale dS^T Q.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .scores import score
from .tiles import dot


@triton.jit
def add_queries(
    dk, dv, k, v, q, do, lse, delta, i, j, keep, score_mod, CAUSAL: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """`(dk, dv, ds)`: adds what queries `i` give to dK / scale and dV of keys `j`.

    `dk` and `k` are [BLOCK_N, BLOCK_D], `dv` and `v` [BLOCK_N, BLOCK_DV], `q` [BLOCK_M, BLOCK_D], `do`
    [BLOCK_M, BLOCK_DV], `lse` and `delta` [BLOCK_M], `keep` [BLOCK_N, 1] or None, and `ds` is [BLOCK_N, BLOCK_M].
    """
    zeros = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
    products = dot(k, tl.trans(q), zeros)  # [BLOCK_N, BLOCK_M]
    scores, slope = score(products, i[None, :], j[:, None], keep, score_mod, CAUSAL, EDGE)
    p = tl.exp2(scores - lse[None, :])  # [BLOCK_N, BLOCK_M]
    dv = dot(p.to(q.dtype), do, dv)
    ds = p * (dot(v, tl.trans(do), zeros) - delta[None, :])  # [BLOCK_N, BLOCK_M]
    if score_mod.scoring.cap is not None:
        ds *= slope
    ds = ds.to(q.dtype)
    return dot(ds, q, dk), dv, ds

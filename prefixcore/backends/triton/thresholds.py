"""All that a run on a GPU may change of the choice of a path: from which sizes on, and whose kernels."""

from __future__ import annotations

import os

from . import flash4, fused_attention

FEWER_LAUNCHES = os.environ.get("PREFIXCORE_FEWER_LAUNCHES") or "0"
"""Whether `decode_once` and `short` are chosen ("1"), or only forced ("0"): they are right in Triton's interpreter and
compile for every architecture, and no GPU has run them yet. Where one has, "1" becomes what nobody has to ask for."""

DECODE_QUERIES = 16
"""Up to so many queries, there are more processors than blocks of queries: the keys are split instead."""

MERGED_KEYS = 512
"""Below so many keys, a second launch costs more than PyTorch's fused attention saves. Not tuned on a device."""

SHORT_KEYS, SHORT_TOKENS = 512, 8192
"""Up to so many keys, and so many tokens in a batch, the launches of a backward cost more than what they launch. At
8 x 64 of SmolLM2-135M's shape an H200 takes 1.7 ms to launch seven, and .1 for their work."""

FA4_KEYS = 1024
"""From so many keys on, FlashAttention-4 over both is quicker. On an H200, forward and backward over cuDNN without a
prefix, P = 64: at T = 2048 1.16, and 1.21 with our kernels on the prefix; at T = 512 1.59 and 1.50."""

FA4_PACKED = 512
"""Packed rows are laid side by side only from so many tokens a sequence on: each gets a prefix of its own. Not tuned on
a device."""

FOLDED_PREFIX = ((64, 1024), (128, 320), (256, 1024))
"""From how many virtual tokens on a vendor does the prefix, for head dims up to the first number. On an H200
(B, H, Hkv, T, D = 8, 32, 8, 2048, 128, forward and backward over cuDNN without a prefix) our kernels take 1.21 at
P = 64 and 2.01 at 512, folded into cuDNN's 1.52 and 1.61: the lines cross at 260. Both costs go with the number of
queries, so T does not matter: at T = 8192 and P = 512 it is 1.32 and 1.19. No other head dim was measured that far."""

FOLDED_VENDORS = (fused_attention.CUDNN.name, flash4.FLASH4.name, fused_attention.STAND_IN.name)
"""Whose kernels are worth it. FlashAttention-2's is not on an H200 (half the rate of cuDNN's; 4.72 for 3.66 with our
kernels at P = 2048), and was not measured on anything older."""

REPEATABLE = (fused_attention.FLASH.name, flash4.FLASH4.name, fused_attention.STAND_IN.name)
"""Whose gradients of keys and values have the same bits on every run, as those of a prefix must.

FlashAttention-2 (PyTorch's): a block of keys belongs to one thread block, which walks over the queries in order, and
heads are added by a sum of PyTorch's; its atomic additions are the queries' gradients alone. FlashAttention-4: told to
be deterministic. cuDNN: not known. The graph that PyTorch has it build accumulates the gradient of the queries alone,
and its deterministic variant changes nothing else, but its engines are closed, PyTorch calls it not deterministic, and
no run on a GPU has compared the bits. Where one has (`test_on_device.py`, with `use_path("folded")`), name it here."""

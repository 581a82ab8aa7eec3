"""The Triton kernels. To import one of these modules is to import Triton; nothing else in prefixcore does.

What kernels share: `sequences` (which sequence and prefix a program works on), `ranges` (whole tiles and edge tiles),
`tiles` (loading and storing), `scores`, `online_softmax`, `grad_tile`. A file for each kernel: `forward`, `decode`,
`decode_once` (with `decode_schedule`, `decode_merge` and `counters`), `delta`, `grad_query`, `grad_keys`,
`grad_prefix`, `grad_once`, `grad_short_prefix`; and what stands between a vendor's kernels and us, `merge` and
`beside`. Each has its launcher at the end, a `launch_*` function, most of which take an `AttentionProblem`. `launch`
has their arguments and block sizes.

What a tile needs is in one tuple (`online_softmax.Keys`, `grad_keys.Queries`), which the kernel itself builds: in
Triton 3.6 no function can return a tuple that holds a None. Compile-time constants stay outside of it, because a tuple
that is assigned to a name turns them into run-time values.
"""

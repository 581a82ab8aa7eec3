"""Run by .ci/run: the package installed from a wheel is complete, and its compiled ops work.

`check_wheel.py SITE`: SITE is where the wheel was installed to.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

BROUGHT_BY_TORCH = set(sys.modules)

import prefixcore  # noqa: E402
from prefixcore.backends import library  # noqa: E402


def main(site: Path) -> None:
    package = Path(prefixcore.__file__).resolve().parent
    if package.parent != site.resolve():
        raise SystemExit(f"imported {package}, expected the one under {site}")
    for pattern in ("_kernels.so", "_host*.so", "_host.pyi", "py.typed", "audit/page.html.j2"):
        if not list(package.glob(pattern)):
            raise SystemExit(f"the wheel lacks prefixcore/{pattern}")
    heavy = {"transformers", "peft", "safetensors", "tqdm", "matplotlib"} & (set(sys.modules) - BROUGHT_BY_TORCH)
    if heavy:
        raise SystemExit(f"import prefixcore brought in {', '.join(sorted(heavy))}; it needs torch alone")

    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 32)
    key, value = torch.randn(2, 2, 2, 9, 32)
    prefix_key, prefix_value = torch.randn(2, 2, 5, 32, requires_grad=True)
    results = {}
    for backend in ("cpu", "reference"):
        with prefixcore.use_backend(backend):
            out = prefixcore.prefix_attention(query, key, value, prefix_key, prefix_value)
            (gradient,) = torch.autograd.grad(out.square().sum(), prefix_key)
            ids = torch.tensor([[7, 0, 11, 10]])
            embedded = prefixcore.soft_embedding(ids, torch.eye(10), torch.ones(2, 10))
        results[backend] = (out, gradient, embedded)
    for ours, reference in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    subprocess.run([sys.executable, "-m", "prefixcore", "doctor"], check=True)
    print(f"the wheel is complete; its ops work ({library.host().isa()})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

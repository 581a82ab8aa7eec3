"""Where there is no Triton (it is made for Linux), its kernels cannot even be imported."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_merged.py", "test_registration.py", "test_soft_embedding.py"]

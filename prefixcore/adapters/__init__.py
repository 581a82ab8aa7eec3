"""Adapters: the folders that hold what was trained. Needs torch and safetensors."""

from .errors import AdapterError
from .files import check_target, read_adapter, read_record, write_adapter
from .fingerprint import compare_fingerprints, fingerprint
from .manifest import Manifest
from .module import Adapter, make_module

__all__ = [
    "Adapter",
    "AdapterError",
    "Manifest",
    "check_target",
    "compare_fingerprints",
    "fingerprint",
    "make_module",
    "read_adapter",
    "read_record",
    "write_adapter",
]

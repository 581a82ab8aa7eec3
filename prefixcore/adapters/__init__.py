"""Adapters: the folders that hold what was trained. Needs torch and safetensors."""

from .errors import AdapterError
from .fingerprint import fingerprint
from .hub import download
from .hub_upload import upload
from .manifest import Manifest
from .module import Adapter, make_module
from .reading import adapter_digest, read_adapter, read_record
from .registry import Registry
from .registry_entry import Entry
from .registry_log import Event, Replaced
from .same_model import compare_fingerprints
from .verify import Check, verify_adapter
from .writing import check_target, write_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "Check",
    "Entry",
    "Event",
    "Manifest",
    "Registry",
    "Replaced",
    "adapter_digest",
    "check_target",
    "compare_fingerprints",
    "download",
    "fingerprint",
    "make_module",
    "read_adapter",
    "read_record",
    "upload",
    "verify_adapter",
    "write_adapter",
]

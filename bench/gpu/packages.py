"""The packages that `make gpu` stands on, and which of them a Python lacks.

Only Python's own library is imported here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

GIVEN = {"torch": "torch>=2.10", "triton": "triton>=3.6", "transformers": "transformers>=5.13"}
"""What the Python that it is started with has to have."""
NEEDED = {"setuptools": "setuptools>=77", "ninja": "ninja", "pybind11": "pybind11>=2.13", "pytest": "pytest>=8",
          "hypothesis": "hypothesis>=6.100", "safetensors": "safetensors>=0.8"}  # fmt: skip
"""What everything needs."""
OF_MODELS = {"peft": "peft>=0.21", "accelerate": "accelerate>=1.1"}
"""What parts with whole models need: ours is held to PEFT's there, and measured beside it."""


def missing(packages: dict[str, str]) -> list[str]:
    """What is asked for of the packages that are not there, or too old: `{module: requirement}`."""
    absent = [asked for module, asked in packages.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("packaging") is None:  # transformers and pytest depend on it
        return absent
    from packaging.requirements import Requirement

    for asked in packages.values():
        requirement = Requirement(asked)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # installed under another name, or not at all: that stands in `absent` already
        if asked not in absent and not requirement.specifier.contains(version, prereleases=True):
            absent.append(asked)
    return absent

"""Everything that can be checked of an adapter, each by its name, so that what fails can be said in one word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .errors import AdapterError, shown
from .files import find_adapter
from .replace import identity
from .verify_folder import Folder, NotApplicable, Unchecked

_TRIES = 3
"""How often a folder that is replaced while it is read is read again."""

PASSED, FAILED, UNCHECKED, NOT_APPLICABLE = "ok", "FAILED", "not checked", "not applicable"


SAID = ("task", "base_model", "license", "intended_use", "data", "metrics", "training", "seed", "libraries", "date")
"""Fields of the manifest, each a check of its name."""


@dataclass(frozen=True)
class Check:
    """What one check has found.

    Attributes:
        name: of the check.
        outcome: "ok", "FAILED", "not checked", or "not applicable" to the way in which the adapter was made.
        detail: in words.

    Examples:
        >>> from prefixcore.adapters import verify_adapter
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt", task="country -> capital", license="MIT")
        >>> [check.name for check in verify_adapter(folder) if check.failed]
        ['intended_use', 'data', 'metrics', 'training', 'seed']
    """

    name: str
    outcome: str
    detail: str

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return self.outcome == FAILED


def verify_adapter(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    public_key: str | Path | None = None,
    signature: str | Path | None = None,
) -> list[Check]:
    """Checks all of an adapter, and goes on after what fails: `failed` says of each check whether it did.

    `manifest`, `digest`, `files`, `tensors`, `peft`, `loads`; that `task`, `base_model`, `license`, `intended_use`,
    `data`, `metrics`, `training`, `seed`, `libraries` and `date` are said, but for `data`, `metrics` and `seed` of a
    prefix that was baked from a text alone, which had no training; `model`, where there is one to compare with;
    `signature`, where there is one or a key.

    Args:
        directory: the adapter's folder.
        model: the base model that it is to be used with.
        public_key: a PEM file, of whoever is to have signed it.
        signature: the file; None: `model.sig` in the folder.

    Raises:
        AdapterError: no such folder.
        TypeError: `model` is none, but its name, say.

    Examples:
        >>> from prefixcore.adapters import verify_adapter
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt")
        >>> {check.name: check.outcome for check in verify_adapter(folder, model=model)}["model"]
        'ok'
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected the base model itself, as AutoModelForCausalLM.from_pretrained(...) opens it, got "
            f"{shown(model)}; or verify on the command line: prefixcore verify ADAPTER --model DIR_OR_ID"
        )
    folder = find_adapter(Path(directory))
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    for _ in range(_TRIES):
        before = identity(folder)
        checks = _verify(Folder(folder), model, public_key, signature)
        if identity(folder) == before:
            break
    return checks


def _verify(
    found: Folder, model: nn.Module | None, public_key: str | Path | None, signature: str | Path | None
) -> list[Check]:
    return [
        _run("manifest", found.check_manifest),
        _run("digest", found.check_digest),
        _run("files", found.check_files),
        _run("tensors", found.check_tensors),
        _run("peft", found.check_peft),
        _run("loads", found.check_loads),
        *(_run(name, lambda name=name: found.check_said(name)) for name in SAID),  # type: ignore[misc]
        _run("model", lambda: found.check_model(model)),
        _run("signature", lambda: found.check_signature(public_key, signature)),
    ]


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, PASSED, check())
    except Unchecked as error:
        return Check(name, UNCHECKED, str(error))
    except NotApplicable as error:
        return Check(name, NOT_APPLICABLE, str(error))
    except AdapterError as error:
        return Check(name, FAILED, str(error))
    except OSError as error:
        return Check(name, FAILED, f"{error.filename}: cannot be read: {error.strerror or error}")
    except RecursionError:
        return Check(name, FAILED, "nested too deep")


def failures(checks: list[Check]) -> list[str]:
    """The names of the checks that failed."""
    return [check.name for check in checks if check.failed]


def as_dicts(checks: list[Check]) -> list[dict[str, str]]:
    """The checks, as JSON can hold them."""
    return [dataclasses.asdict(check) for check in checks]

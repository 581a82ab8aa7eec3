"""What the subcommands share: exit codes, options, and opening a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._interrupt import INTERRUPTED
from .._text import printable
from .failures import UserError, user_errors
from .model_size import check_size
from .output import say

if TYPE_CHECKING:
    from ..adapters import Adapter

__all__ = ["FOUND_WRONG", "INTERRUPTED", "OK", "USER_ERROR"]

OK, FOUND_WRONG, USER_ERROR = 0, 1, 2
"""Exit codes: done; done, and what was to be checked is not right (a line on standard error for each thing);
something the user can mend (one line on standard error). `INTERRUPTED`: stopped by Ctrl-C."""

NAMED = "folder of a transformers model, or its id (default: the one that the adapter names)"
"""The help of `--model` where `named_model` stands in for it."""

ADAPTER = "folder that prefixcore or PEFT wrote, or its name on the Hub: user/name, user/name@revision"
"""The help of what `adapter_folder` takes."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, said: str = "folder of a transformers model, or its id"
) -> None:
    """`--model`, `--dtype` and `--device`; `said`: the help of the first."""
    parser.add_argument("--model", required=required, metavar="DIR_OR_ID", help=said)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as they are stored)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)"
    )


def add_force_argument(parser: argparse.ArgumentParser) -> None:
    """`--force`."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="take a model that does not look like the one the adapter was trained for, as long as the shapes fit",
    )


def adapter_name(text: str) -> Path:
    """An argparse type: a folder, or a name on the Hub; `./user/name`, of which a path is `user/name`, is a folder."""
    return Path(text).absolute() if text.startswith((f".{os.sep}", "./")) else Path(text)


def adapter_folder(named: Path) -> Path:
    """The folder of the adapter that is named, also of one on the Hub; UserError: there is none."""
    if named.is_dir():
        return named
    from ..adapters import AdapterError
    from ..adapters.hub import local_folder

    with user_errors(AdapterError):
        folder = local_folder(named)
    if not folder.is_dir():
        raise UserError(f"{named} is not a folder; expected one that prefixcore or PEFT wrote, or user/name on the Hub")
    return folder


def named_model(adapter: Adapter) -> str:
    """The base model that an adapter names, for want of `--model`; UserError: it names none."""
    name = adapter.base_model_name
    if name is None:
        raise UserError("--model is missing, and the adapter names no base model; give it")
    say(f"base model  {printable(name)}, as the adapter says")
    return name


def load_adapter(model: Any, folder: Path, *, trainable: bool = False, force: bool = False) -> Any:
    """`prefixcore.load`, whose warnings are lines on standard error."""
    from ..hf import load

    with warnings_as_lines():
        return load(model, folder, trainable=trainable, strict=not force)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """A block after which each warning that is meant for users is a line on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(f"warning: {warning.message}")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 to 2^63 - 1."""
    return _whole(text, least=1)


def seed(text: str) -> int:
    """An argparse type: a whole number from 0 to 2^63 - 1, which every random number generator takes."""
    return _whole(text, least=0)


def port(text: str) -> int:
    """An argparse type: the number of a port."""
    value = positive(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, got {value}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise argparse.ArgumentTypeError(f"expected a whole number, got {shown!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError("must be below 2^63")
    return value


def add_column_arguments(group: Any) -> None:
    """`--prompt-column` and `--completion-column`."""
    for name in ("prompt", "completion"):
        group.add_argument(
            f"--{name}-column", default=name, metavar="NAME", help=f"what it is called in the data (default: {name})"
        )


def columns_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """Which columns are the prompt and the completion."""
    return arguments.prompt_column, arguments.completion_column


def option(name: str) -> str:
    """The option that sets the attribute `name`."""
    return "--" + name.replace("_", "-")


def plain_escapes(text: str) -> str:
    r"""An argparse type: text in which `\n` and `\t` stand for a line break and a tab."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python has made half of a character of each byte that is not UTF-8
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {text[:40]!a}") from None
    return text.replace("\\n", "\n").replace("\\t", "\t")


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The causal language model that `--model` names, in evaluation mode, and its tokenizer.

    Raises:
        UserError: no such folder, not a model that transformers can open, weights that are not whole, or no such
            device.
    """
    device = _device(arguments.device)
    name = arguments.model
    check_model_folder(name)
    check_size(name)

    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    from ..hf.model.auto_class import auto_class

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its tables of weights that are missing would stand before our line
    try:
        # What transformers raises for a broken folder is of any kind: KeyError, TypeError, plain Exception.
        with user_errors(Exception, what=f"--model {name} cannot be opened"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            loaded: Any = auto_class(config).from_pretrained(
                name,
                dtype=arguments.dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    check_weights(name, report)
    with user_errors(RuntimeError, what=f"--device {arguments.device}"):
        return model.to(device).eval(), tokenizer


def check_weights(name: str, report: dict[str, Any]) -> None:
    """Refuse a model some of whose weights are random, and say how many of those in its files are of no use."""
    for kind, what in (("missing_keys", "not in its files"), ("mismatched_keys", "of another shape in its files")):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report[kind])
        if keys:
            raise UserError(f"--model {name} is not whole: {len(keys)} of its weights, such as {keys[0]}, are {what}")
    if unused := sorted(report["unexpected_keys"]):
        say(f"warning: {len(unused)} weights in the files of {name}, such as {unused[0]}, are not the model's")


def check_model_folder(name: str) -> None:
    """Raises UserError if `name` looks like a folder, but none that holds a model in regular files."""
    folder = Path(name)
    with user_errors(OSError, what=f"--model {name} cannot be read"):
        looks_local = folder.is_absolute() or name.startswith((".", "~")) or folder.exists()
        if not looks_local:
            return
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "is not a folder"
            raise UserError(f"--model {name} {what}; expected the folder of a transformers model")
        for entry in folder.iterdir():  # reading from a pipe or a device might never end
            if entry.exists() and not entry.is_file() and not entry.is_dir():
                raise UserError(f"--model {name}: {entry.name} is not a regular file")


def _device(name: str) -> Any:
    """The device of that name; UserError: there is none that computes."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # A device that this build of torch lacks is an AssertionError, a RuntimeError or an ImportError.
    with user_errors(Exception, what=f"--device {name} cannot be used"):
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    return device

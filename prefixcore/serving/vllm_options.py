"""The options that follow `--` and are vLLM's own: what they say, on the command line and in the file of `--config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import LaunchError

_OPTION = re.compile("--?[A-Za-z]")
"""What begins an option, long or short (-tp); a number below 0 is a value."""

_FILE = "--config"


def values_of(option: str, arguments: Sequence[str]) -> list[str] | None:
    """What vLLM's `arguments` give an option, the last time that it stands there; None: it is not there.

    Raises:
        LaunchError: the file of `--config` cannot be read.

    Examples:
        >>> from prefixcore.serving.vllm_options import values_of
        >>> values_of("--max-model-len", ["--max_model_len=512", "--enforce-eager"])
        ['512']
    """
    found, is_it = None, False
    for argument in in_full(arguments):
        if _OPTION.match(argument):
            name, _, value = argument.partition("=")
            is_it = name.replace("_", "-") == option
            found = [*filter(None, [value])] if is_it else found
        elif is_it and found is not None:
            found.append(argument)
    return found


def in_full(arguments: Sequence[str]) -> list[str]:
    """The arguments with what the file of `--config` says before them, as vLLM reads them: the command line wins.

    Raises:
        LaunchError: vLLM would not read the file, or fail at it.
    """
    if any(argument.startswith(f"{_FILE}=") for argument in arguments):
        raise LaunchError(f"vLLM ignores a file that is given as {_FILE}=FILE; write {_FILE} FILE")
    if _FILE not in arguments:
        return list(arguments)
    if arguments.count(_FILE) > 1:
        raise LaunchError(f"{_FILE} is given {arguments.count(_FILE)} times, and vLLM reads one file; give one")
    at = arguments.index(_FILE)
    if at + 1 == len(arguments):
        raise LaunchError(f"{_FILE} is the last argument; expected a file after it, such as vllm.yaml")
    file = Path(arguments[at + 1])
    if file.suffix not in (".yaml", ".yml"):
        raise LaunchError(f"{_FILE} {file}: expected a file whose name ends in .yaml or .yml, as vLLM does")
    return [*_written_out(_read(file)), *arguments[:at], *arguments[at + 2 :]]


def _read(file: Path) -> dict[str, Any]:
    import yaml  # comes with transformers

    try:
        options = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LaunchError(f"{_FILE} {file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise LaunchError(f"{_FILE} {file}: expected options of vLLM, one a line, such as max-model-len: 4096")
    return options


def _written_out(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif value != []:
            yield f"--{name}"
            yield from [json.dumps(value)] if isinstance(value, dict) else map(str, _listed(value))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

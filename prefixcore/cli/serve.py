"""Serve a model and a folder of adapters with vLLM: each adapter by its name as the model."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from .. import _interrupt
from .common import OK, port, positive
from .failures import UserError, user_errors
from .output import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore serve`."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="folder of a transformers model, or its id")
    parser.add_argument(
        "--adapters", type=Path, required=True, metavar="DIR", help="folder of adapters; it may change while they serve"
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=port, default=8000, help="default: 8000")
    parser.add_argument(
        "--bake",
        action="store_true",
        help="bake what is no prefix, such as soft prompts, once, on the CPU; the folder of adapters is only read",
    )
    parser.add_argument(
        "--baked", type=Path, metavar="DIR", help="where --bake puts the prefixes (default: beside DIR, as DIR.baked)"
    )
    parser.add_argument(
        "--allow-problems",
        action="store_true",
        help="start although some adapters cannot be served; who asks for one of them is told why",
    )
    parser.add_argument(
        "--unverified-model",
        action="store_true",
        help="serve a model of a family that was not compared with transformers; then run validate-serving",
    )
    parser.add_argument(
        "--placeholder", type=int, metavar="ID", help="token that stands for a virtual one (default: by the tokenizer)"
    )
    parser.add_argument(
        "--start-timeout", type=positive, default=1800, metavar="SECONDS", help="that vLLM may take (default: 1800)"
    )
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the Python that has vLLM")
    parser.add_argument(
        "--dry-run", action="store_true", help="check (and bake) all, print vLLM's command and do not start it"
    )
    parser.add_argument("vllm", nargs="*", metavar="-- ARGUMENT", help="whatever follows -- goes to vLLM")


def run(arguments: argparse.Namespace) -> int:
    """Check the adapters, start vLLM, and wait until it ends."""
    import shlex

    from ..serving.errors import LaunchError
    from ..serving.launch import launch, wait_until_ready
    from ..serving.vllm_command import vllm_command

    _interrupt.tell("the server is not started")
    with user_errors(LaunchError):
        check_vllm(arguments.python, needed=not arguments.dry_run)
        baked = where_to_bake(arguments)
        placeholder, names = check_adapters(arguments, baked)
        command = vllm_command(
            arguments.model,
            arguments.adapters,
            host=arguments.host,
            port=arguments.port,
            placeholder=placeholder,
            unverified_models=arguments.unverified_model,
            baked=baked if baked is not None and baked.is_dir() else None,  # nothing had to be baked
            python=arguments.python,
            arguments=arguments.vllm,
        )
        if arguments.dry_run:
            from .output import results

            results(shlex.join(command))
            return OK
        _interrupt.tell("the server has ended", at_once=False)
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            server = launch(command, arguments.host, arguments.port)
            try:
                say(f"starting vLLM (process {server.process.pid}); what it prints follows")
                seconds = wait_until_ready(server, timeout=arguments.start_timeout, say=say)
                say(f"ready after {seconds:.0f} s: {server.url}/v1 serves {', '.join(names)}; Ctrl-C ends it")
                code = server.process.wait()
            except KeyboardInterrupt:
                say("stopping vLLM ...")
                raise
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                server.stop()
        finally:
            signal.signal(signal.SIGTERM, before)
    raise UserError(f"vLLM has ended by itself with code {code}; what it has printed says why")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def check_vllm(python: str, *, needed: bool) -> None:
    """Says what to install where vLLM is missing, and which version was tested where it is another one."""
    from ..serving.errors import NotInstalledError
    from ..serving.vllm_command import TESTED, find_vllm

    try:
        version = find_vllm(python)
    except NotInstalledError as error:
        if needed:
            raise
        say(f"warning: {error}")
        return
    if not version.startswith(f"{TESTED}."):
        say(f"warning: this is vLLM {version}; prefixcore's connector and front are tested with {TESTED}")


def where_to_bake(arguments: argparse.Namespace) -> Path | None:
    """The folder for baked prefixes; None: nothing is to be baked."""
    from ..serving.baked import baked_folder

    if not arguments.bake:
        if arguments.baked is not None:
            raise UserError("--baked is where --bake puts prefixes, and --bake is not given")
        return None
    return (arguments.baked or baked_folder(arguments.adapters)).absolute()


def bake_adapters(arguments: argparse.Namespace, baked: Path) -> dict[str, str]:
    """Bakes what a server cannot take; what could not be baked, by name, and why."""
    from ..adapters import AdapterError, Registry
    from ..serving.baked import bake_registry
    from .common import open_model, warnings_as_lines

    def model() -> Any:
        # In float32, as exact as it can be; on the CPU, for a GPU is to be empty when vLLM starts.
        return open_model(argparse.Namespace(model=arguments.model, dtype="float32", device="cpu"))[0]

    with user_errors(AdapterError), warnings_as_lines():
        return bake_registry(Registry(arguments.adapters), baked, model, say)


def check_adapters(arguments: argparse.Namespace, baked: Path | None) -> tuple[int, list[str]]:
    """The placeholder, and the names that will be served.

    Args:
        arguments: of the command.
        baked: where what is no prefix is baked to; None: it is not baked.

    Raises:
        UserError: no such model or folder, or an adapter that cannot be served, by name.
    """
    from .common import check_model_folder

    folder = arguments.adapters
    if not folder.is_dir():
        raise UserError(f"--adapters {folder} is not a folder; expected one with a folder for each adapter")
    if (folder / "adapter_model.safetensors").exists():
        raise UserError(f"--adapters {folder} is an adapter; expected a folder of adapters, such as {folder.parent}")
    check_model_folder(arguments.model)

    from transformers import AutoTokenizer

    from ..serving.before_start import choose_placeholder, describe_model, why_not_served
    from ..serving.catalog import Catalog
    from ..serving.context_length import context_length, why_no_room
    from ..serving.vllm_command import served_names

    with user_errors(Exception, what=f"--model {arguments.model} cannot be opened"):
        model = describe_model(arguments.model)
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    if why := why_not_served(arguments.model, arguments.vllm, unverified_model=arguments.unverified_model):
        raise UserError(f"--model {arguments.model}: {why}")
    placeholder = choose_placeholder(tokenizer) if arguments.placeholder is None else arguments.placeholder
    if not 0 <= placeholder < len(tokenizer):
        raise UserError(f"--placeholder {placeholder} is no token; expected one from 0 to {len(tokenizer) - 1}")
    bases = served_names(arguments.model, arguments.vllm)
    length = context_length(arguments.model, arguments.vllm)
    unbaked = {} if baked is None else bake_adapters(arguments, baked)
    with user_errors(ValueError):
        adapters = Catalog(folder, model, baked if baked is not None and baked.is_dir() else None)
    served, problems = adapters.served(), adapters.problems()
    problems |= {name: why for name, why in unbaked.items() if name in problems}
    for adapter in served:
        if why := why_no_room(adapter.num_virtual_tokens, length):
            problems[adapter.name] = why
    names = [adapter.name for adapter in served if adapter.name not in problems]
    for base in set(bases).intersection(names):
        names.remove(base)
        problems[base] = "it has the name of the model; rename its folder, or give -- --served-model-name NAME"
    for name, why in problems.items():
        say(f"adapter {name}: {why}")
    if problems and not arguments.allow_problems:
        raise UserError(
            f"{len(problems)} of {len(names) + len(problems)} adapters cannot be served (above): "
            f"{', '.join(problems)}; mend or remove them, or give --allow-problems"
        )
    if not names:
        say(f"warning: there is no adapter in {folder} yet; those put there are served without a restart")
    for adapter in (each for each in served if each.name in names):
        task = f", {adapter.task}" if adapter.task else ""
        task += f", baked into {adapter.folder}" if adapter.baked_from else ""
        count = adapter.num_virtual_tokens
        room = "" if length is None else f" of the {length:,} that a request may have"
        say(f"adapter {adapter.name}: {count:,} virtual tokens{room}, digest {adapter.digest[:12]}{task}")
    return placeholder, [bases[0], *names]

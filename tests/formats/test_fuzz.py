"""Files with bytes changed, cut or doubled are read as something finite, or refused with our own error."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError
from prefixcore.adapters.formats import FORMATS, PREFIX, Facts
from prefixcore.hf.baking.converting import facts_of

from .conftest import FIXTURES

TRIES = 150


def mangled(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 3, 20))):
        at = dice.randrange(len(changed))
        kind = dice.randrange(4)
        if kind == 0:
            changed[at] = dice.randrange(256)
        elif kind == 1:
            changed[at : at + 4] = dice.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff"))
        elif kind == 2:
            del changed[at : at + dice.randrange(1, 64)]
        else:
            changed[at:at] = changed[at : at + dice.randrange(1, 64)]
        if not changed:
            break
    return bytes(changed)


def read(name: str, path: Path, facts: Facts) -> None:
    try:
        contents = FORMATS[name].read(path, facts)
    except AdapterError:
        return
    for pair in contents.prefix or [(contents.prompts, contents.prompts)]:
        assert all(tensor is not None and torch.isfinite(tensor).all() for tensor in pair)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cartridges", "lmcache", "vllm", "tensorrt-llm", "gguf"])
def test_one_file(name: str, prefix: Path, prompt: Path, model: Any, tmp_path: Path) -> None:
    source = prefix if PREFIX in FORMATS[name].kinds else prompt
    prefixcore.export_adapter(source, name, tmp_path / "theirs")
    whole = tmp_path / "theirs"
    whole = next(whole.iterdir()) if whole.is_dir() else whole
    data, dice, facts = whole.read_bytes(), random.Random(0), facts_of(model)
    path = tmp_path / "mangled"
    for _ in range(TRIES):
        path.write_bytes(mangled(data, dice))
        read(name, path, facts)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_the_adapters_library(tmp_path: Path) -> None:
    from tests.hf.models import make

    from .test_adapterhub import SIZES

    facts, dice = facts_of(make("llama", **SIZES)), random.Random(0)
    for number in range(TRIES):
        folder = tmp_path / "mangled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FIXTURES / "adapters" / ("flat", "mlp")[number % 2], folder)
        path = folder / ("adapter_config.json", "pytorch_adapter.bin")[number // 2 % 2]
        path.write_bytes(mangled(path.read_bytes(), dice))
        read("adapters", folder, facts)

"""PEFT's six types: its files give its outputs, and ours, without our manifest, are its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from tests import tiny

from .conftest import P
from .outputs import with_adapter

CONFIGS: dict[str, Any] = {
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "CARTRIDGE": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=2),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=2, num_ranks=2
    ),
    "CPT": peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
}


def logits(wrapped: Any, ids: torch.Tensor, kind: str) -> torch.Tensor:
    tasks = {"task_ids": torch.ones(len(ids), dtype=torch.long)} if kind.startswith("MULTI") else {}
    with torch.no_grad():
        return wrapped.eval()(input_ids=ids, **tasks).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back(kind: str, ids: torch.Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.model(), CONFIGS[kind])
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, ids, kind)

    model = tiny.model()
    prefixcore.import_adapter(tmp_path / "theirs", "peft", tmp_path / "ours", model=model, task="x -> y")
    adapter = read_adapter(tmp_path / "ours")
    assert adapter.manifest is not None
    assert adapter.peft_config is not None
    # P-tuning's encoder is not in PEFT's file: what is left is a prompt.
    assert adapter.peft_config["peft_type"] == ("PROMPT_TUNING" if kind == "P_TUNING" else kind)
    if not kind.startswith("MULTI"):
        torch.testing.assert_close(with_adapter(model, tmp_path / "ours", ids), expected, atol=2e-5, rtol=0)
    else:
        with prefixcore.load(model, tmp_path / "ours"), torch.no_grad():
            got = model(input_ids=ids, task_ids=[1] * len(ids)).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)

    lost = prefixcore.export_adapter(tmp_path / "ours", "peft", tmp_path / "again")
    assert lost == ["manifest (task, provenance)"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    again = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "again")
    torch.testing.assert_close(logits(again, ids, kind), expected, atol=2e-5, rtol=0)


def test_a_cartridge_of_peft_is_one_of_hazyresearch(ids: torch.Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.model(), CONFIGS["CARTRIDGE"])
    theirs.save_pretrained(tmp_path / "theirs")
    prefixcore.export_adapter(tmp_path / "theirs", "cartridges", tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=False)
    assert saved["frozen_keys"][0].shape == (1, 2, 2, 16)
    model = tiny.model()
    prefixcore.import_adapter(tmp_path / "c.pt", "cartridges", tmp_path / "back", model=model)
    expected = logits(theirs, ids, "CARTRIDGE")
    torch.testing.assert_close(with_adapter(model, tmp_path / "back", ids), expected, atol=2e-5, rtol=0)


def test_a_dtype_is_not_pefts(prompt: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="written in float32; leave --dtype out"):
        prefixcore.export_adapter(prompt, "peft", tmp_path / "x", dtype=torch.float16)


def exported(tmp_path: Path, model: Any) -> Path:
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=P, init="random")) as handle:
        handle.save(tmp_path / "ours")
    prefixcore.export_adapter(tmp_path / "ours", "peft", tmp_path / "theirs")
    return tmp_path / "theirs"


def test_what_comes_back_is_not_taken_for_another_models(tmp_path: Path) -> None:
    folder, other = exported(tmp_path, tiny.model()), tiny.model(seed=1)
    with pytest.raises(AdapterError, match="other weights than the one the adapter was trained for"):
        prefixcore.import_adapter(folder, "peft", tmp_path / "back", model=other)
    assert not (tmp_path / "back").exists()
    with pytest.raises(AdapterError, match="other weights"):
        prefixcore.load(other, folder)
    prefixcore.import_adapter(folder, "peft", tmp_path / "back", model=tiny.model())
    ours, back = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "back")
    assert back.manifest is not None
    assert ours.manifest is not None
    assert back.manifest.base_model == ours.manifest.base_model
    prefixcore.export_adapter(folder, "peft", tmp_path / "again")  # from hand to hand it stays known
    with pytest.raises(AdapterError, match="other weights"):
        prefixcore.load(other, tmp_path / "again")


def test_the_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny.model())
    plain, known = ((each / "adapter_model.safetensors").read_bytes() for each in (tmp_path / "ours", folder))
    headers = [8 + int.from_bytes(data[:8], "little") for data in (plain, known)]
    assert headers[1] % 8 == 0
    assert plain[headers[0] :] == known[headers[1] :]


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "[" * 5000, '{"weights": 5}'])
def test_a_fingerprint_that_is_damaged_is_no_fingerprint_at_all(tmp_path: Path, text: str) -> None:
    folder = exported(tmp_path, tiny.model())
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "prefixcore.base_model": text})
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: .*base_model"):
        prefixcore.load(tiny.model(), folder)


def test_a_name_is_all_that_peft_knows(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.model(), CONFIGS["PREFIX_TUNING"])
    theirs.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "someone/large"}))
    model = tiny.model()
    model.config.name_or_path = "someone/small"
    with pytest.warns(UserWarning, match="says? that it is for 'someone/large' and know none of that model's weights"):
        prefixcore.import_adapter(tmp_path / "theirs", "peft", tmp_path / "ours", model=model)

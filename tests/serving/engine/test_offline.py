"""`PrefixLLM`: vLLM's `LLM` with the adapters of a registry, beside transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from prefixcore.adapters import AdapterError, Registry
from prefixcore.serving.offline import PrefixLLM
from prefixcore.serving.validate_reference import Reference
from tests import tiny
from tests.serving import shelf

from .test_front import MESSAGES, TEMPLATE, TOOLS, VIRTUAL, make_model

TEXTS = ["Peru ->", "x", "the quick brown fox " * 9]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("offline")
    model, tokenizer = make_model(), tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(folder / "tiny-llama")
    for seed, (name, tokens) in enumerate(VIRTUAL.items(), start=1):
        shelf.write(folder / "adapters" / name, seed=seed, tokens=tokens, model=model)
    shelf.soft_prompt(folder / "adapters" / "asked", 6, seed=4, model=model)
    adapters = {name: folder / "adapters" / name for name in (*VIRTUAL, "asked")}
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, reference=Reference(model, tokenizer, adapters))


@pytest.fixture(scope="module")
def llm(place: Any) -> Iterator[PrefixLLM]:
    llm = PrefixLLM(
        place.folder / "tiny-llama", place.folder / "adapters", bake=True,
        dtype="float32", enforce_eager=True, max_model_len=512,
    )  # fmt: skip
    yield llm
    llm.llm_engine.engine_core.shutdown()


def tokens(output: Any) -> list[int]:
    return [token for token in output.outputs[0].token_ids if token != 0]


def test_adapters_and_none_in_one_batch(llm: PrefixLLM, place: Any) -> None:
    names = ["capitals", None, "sums", "long", "asked"]
    pairs = [(name, text) for text in TEXTS for name in names]
    ids = [place.reference.ids(text) for _, text in pairs]
    expected = [place.reference.continuation(name, row, 8)[0] for (name, _), row in zip(pairs, ids, strict=True)]
    assert len(set(map(tuple, expected))) > 10
    for _ in range(2):  # the second time from cached blocks
        for prompts in ([text for _, text in pairs], [{"prompt_token_ids": row} for row in ids]):
            outputs = llm.generate(prompts, GREEDY, adapter=[name for name, _ in pairs], use_tqdm=False)
            assert [tokens(output) for output in outputs] == expected
            assert [output.prompt_token_ids for output in outputs] == ids
            assert all(0 <= (output.num_cached_tokens or 0) <= len(output.prompt_token_ids or []) for output in outputs)
    assert [tokens(output) for output in llm.generate(TEXTS[0], GREEDY, adapter="sums", use_tqdm=False)] == expected[
        2:3
    ]
    bare = llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert [tokens(output) for output in bare] == expected[1::5]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_chat(llm: PrefixLLM, place: Any, tools: Any) -> None:
    template = {"tools": tools, "add_generation_prompt": True}
    ids = place.tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True, **template)["input_ids"]
    for messages, names in ((MESSAGES, "capitals"), ([MESSAGES] * 2, ["capitals", None])):
        outputs: Any = llm.chat(messages, GREEDY, adapter=names, use_tqdm=False, tools=tools)
        for output, name in zip(outputs, [names] if isinstance(names, str) else names, strict=True):
            assert tokens(output) == place.reference.continuation(name, ids, 8)[0]
            assert output.prompt_token_ids == ids


def test_the_registry_may_change(llm: PrefixLLM, place: Any) -> None:
    model, folder = make_model(), place.folder / "adapters" / "new"
    ids = place.reference.ids(TEXTS[0])
    answers = []
    for seed in (11, 12):
        shutil.rmtree(folder, ignore_errors=True)
        shelf.write(folder, seed=seed, tokens=9, model=model)
        (output,) = llm.generate(TEXTS[0], GREEDY, adapter="new", use_tqdm=False)
        answers.append(tokens(output))
        assert answers[-1] == Reference(make_model(), place.tokenizer, {"new": folder}).continuation("new", ids, 8)[0]
    assert answers[0] != answers[1]
    shutil.rmtree(folder)


def test_refusals(llm: PrefixLLM, place: Any) -> None:
    shutil.copytree(place.folder / "adapters" / "sums", place.folder / "adapters" / "broken")
    shelf.damage(place.folder / "adapters" / "broken")
    options: Any = {"sampling_params": GREEDY, "use_tqdm": False}
    for name, words in (("rivers", "named 'rivers'"), ("", "named ''"), ("broken", "broken/adapter_model.safetensors")):
        with pytest.raises(AdapterError, match=words):
            llm.generate(TEXTS, adapter=["sums", name, None], **options)
    shutil.rmtree(place.folder / "adapters" / "broken")
    with pytest.raises(ValueError, match="one for each of 3 prompts, got 2"):
        llm.generate(TEXTS, adapter=["sums", None], **options)
    with pytest.raises(ValueError, match="prompt_logprobs makes vLLM"):
        llm.generate(TEXTS, SamplingParams(prompt_logprobs=1), adapter="sums", use_tqdm=False)
    with pytest.raises(ValueError, match="combined with a LoRA"):
        llm.generate(TEXTS, adapter="sums", lora_request=object(), **options)
    shutil.copytree(place.folder / "tiny-llama", place.folder / "tiny-mistral")
    config = place.folder / "tiny-mistral" / "config.json"
    told = json.loads(config.read_text()) | {"model_type": "mistral", "sliding_window": 64}
    for changes, words in (({}, "disable_sliding_window"), ({"model_type": "codegen"}, "unverified_model")):
        config.write_text(json.dumps(told | changes))
        with pytest.raises(NotImplementedError, match=words):
            PrefixLLM(config.parent, place.folder / "adapters", max_model_len=128)
    with pytest.raises(TypeError, match="kv_transfer_config"):
        PrefixLLM(place.folder / "tiny-llama", place.folder / "adapters", kv_transfer_config={})
    assert [entry.name for entry in Registry(place.folder / "adapters").entries()] == ["asked", *sorted(VIRTUAL)]
    (output,) = llm.generate(TEXTS[0], adapter="sums", **options)
    assert tokens(output) == place.reference.continuation("sums", place.reference.ids(TEXTS[0]), 8)[0]

"""Virtual tokens beside images: outputs and every gradient against attention and embeddings written out, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import prefixcore
from prefixcore import PrefixTuningConfig, PromptBank, PromptTuningConfig

from .vision_language import DECODERS, FAMILIES, IMAGE, batch_of, row_of

P = 3
TEXT = torch.tensor([17, 40, 63])
PREFIX = PrefixTuningConfig(P, init="random", seed=1)
PROMPT = PromptTuningConfig(P, init="random", seed=2)
NEW = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*not among the families")

reference: dict[int, tuple[Tensor, Tensor]] = {}
"""The keys and values [Hkv, P, D] that `written_out` lays before those of each layer."""


def written_out(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    """Attention of transformers' text decoders: keys laid end to end, and the prefix seen by every query."""
    prefix_key, prefix_value = (x.expand(len(key), -1, -1, -1) for x in reference[module.layer_idx])
    groups = query.shape[1] // key.shape[1]
    key = torch.cat((prefix_key, key), 2).repeat_interleave(groups, 1)
    value = torch.cat((prefix_value, value), 2).repeat_interleave(groups, 1)
    seen = torch.nn.functional.pad(mask.expand(len(key), 1, -1, -1), (P, 0))
    scale = options["scaling"] or query.shape[-1] ** -0.5
    return (torch.softmax(query @ key.mT * scale + seen, -1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("written_out", written_out)
AttentionMaskInterface.register("written_out", eager_mask)


def make(family: str) -> Any:
    return FAMILIES[family]().double()


def doubled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    unlearnt = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
    return {**batch, "labels": batch["input_ids"].masked_fill(unlearnt, -100)}


def attach(model: Any, config: Any, **options: Any) -> Any:
    handle = prefixcore.attach(model, config, **options)
    for parameter in handle.parameters():
        parameter.data = parameter.data.double()
    return handle


def positions(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As `generate` gives them: without padding, by tokens or by three axes."""
    if hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        return model.model.get_rope_index(**{name: batch[name] for name in names})[0]
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def run(model: Any, batch: dict[str, Tensor], parameters: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """The outputs and the gradients of `parameters`."""
    out = model(**batch)
    return out, list(torch.autograd.grad(out.loss, parameters))


def assert_same(
    got: tuple[Any, list[Tensor]], expected: tuple[Any, list[Tensor]], seen: Tensor, text: Any = ...
) -> None:
    """`seen`: tokens that are no padding; `text`: those of the expected ones that are not virtual."""
    (out, found), (wanted_out, wanted) = got, expected
    torch.testing.assert_close(out.logits[seen], wanted_out.logits[text].view_as(out.logits)[seen])
    torch.testing.assert_close(out.loss, wanted_out.loss)
    assert all(gradient.abs().max() > 1e-4 for gradient in wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix(family: str, padding: int) -> None:
    """Every query of text and images sees it, images still see themselves both ways, and positions come after it."""
    model, batch = make(family), labelled(doubled(batch_of(family, padding)))
    handle = attach(model, PREFIX)
    got = run(model, batch, list(handle.parameters()))
    pairs = [(key.detach().requires_grad_(), value.detach().requires_grad_()) for key, value in handle.bake()]
    handle.detach()
    reference.update(enumerate(pairs))
    model.config.get_text_config()._attn_implementation = "written_out"
    moved = {**batch, "position_ids": positions(model, batch) + P, "use_cache": False}
    expected = run(model, moved, [x for pair in pairs for x in pair])
    assert_same(got, expected, batch["attention_mask"].bool())


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt(family: str, padding: int) -> None:
    """As tokens of text whose embeddings are the prompt's."""
    model, batch = make(family), labelled(doubled(batch_of(family, padding)))
    longer = labelled(doubled(batch_of(family, padding, TEXT)))
    places = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    for row, before in enumerate((0, padding)):
        places[row, before : before + P] = True
    longer["labels"][places] = -100
    if padding:  # else as the model counts by itself, PaliGemma from 1 on
        longer["position_ids"] = positions(model, longer)
    handle = attach(model, PROMPT)
    got = run(model, batch, list(handle.parameters()))
    prompt = handle.bake().detach().requires_grad_()
    handle.detach()

    def put(module: Any, args: Any, embeddings: Tensor) -> Tensor:
        return embeddings.masked_scatter(places[..., None], prompt.expand(2, -1, -1))

    with model.get_input_embeddings().register_forward_hook(put):
        expected = run(model, longer, [prompt])
    assert_same(got, expected, batch["attention_mask"].bool(), ~places)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_from_a_text(family: str, config: Any) -> None:
    """Before any training it is as good as the text before the image."""
    if family not in DECODERS and config is PrefixTuningConfig:
        pytest.skip("takes no prefix")
    model, batch, longer = make(family), doubled(batch_of(family)), doubled(batch_of(family, text=TEXT))
    with torch.no_grad():
        expected = model(**longer).logits[:, P:]
        attach(model, config(init_text="a text"), tokenizer=lambda text: {"input_ids": TEXT.tolist()})
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)  # it starts in float32


@pytest.mark.parametrize("config", [PREFIX, PROMPT], ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, config: Any) -> None:
    """With a cache, and padding on the left, as without one, each row by itself; also of beams."""
    if family not in DECODERS and config is PREFIX:
        pytest.skip("takes no prefix")
    model, batch = make(family), doubled(batch_of(family, padding=2))
    attach(model, config)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    length = batch["input_ids"].shape[1]
    got = model.generate(**batch, **options)
    expected = torch.cat([greedy(model, row_of(batch, row)) for row in range(2)])
    assert torch.equal(got[:, length:], expected)
    beams = [model.generate(**row_of(batch, row), **options, num_beams=2)[:, -NEW:] for row in range(2)]
    assert torch.equal(model.generate(**batch, **options, num_beams=2)[:, length:], torch.cat(beams))


def greedy(model: Any, row: dict[str, Tensor]) -> Tensor:
    """The likeliest tokens [1, NEW], each from a forward over everything before it."""
    row = dict(row)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**row, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        more = {"input_ids": logits.argmax(-1, keepdim=True), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
        for name in {"token_type_ids", "mm_token_type_ids"} & row.keys():
            more[name] = torch.zeros(1, 1, dtype=row[name].dtype)
        for name, value in more.items():
            row[name] = torch.cat((row[name], value), 1)
    return row["input_ids"][:, -NEW:]


@pytest.mark.parametrize("config", [PREFIX, PROMPT], ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family: str, config: Any) -> None:
    if family not in DECODERS and config is PREFIX:
        pytest.skip("takes no prefix")
    model, batch = make(family).train(), labelled(doubled(batch_of(family, padding=2)))
    parameters = list(attach(model, config).parameters())
    expected = run(model, batch, parameters)
    model.gradient_checkpointing_enable()
    assert_same(run(model, batch, parameters), expected, batch["attention_mask"].bool())


@pytest.mark.parametrize(
    "names", [["prefix", "prompt"], ["short", None], ["prompt", None], ["one", "prompt"], [None, "one"]], ids=str
)
@pytest.mark.parametrize("family", DECODERS)
def test_a_bank(family: str, names: list[str | None]) -> None:
    """Each row is that of its adapter alone, with its own image."""
    configs = {
        "prefix": PREFIX,
        "short": PrefixTuningConfig(1, init="random", seed=3),
        "prompt": PROMPT,
        "one": PromptTuningConfig(1, init="random", seed=4),
    }
    model, batch = make(family), doubled(batch_of(family, padding=2))
    bank = PromptBank(model)
    for name in filter(None, names):
        bank.attach(name, configs[name])
    with torch.no_grad():
        mixed = model(**batch, task_ids=names).logits
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        generated = model.generate(**batch, task_ids=names, **options)[:, -NEW:]
        bank.detach()
        for row, name in enumerate(names):
            handle = None if name is None else prefixcore.attach(model, configs[name])
            alone = row_of(batch, row)
            torch.testing.assert_close(mixed[row, batch["attention_mask"][row].bool()], model(**alone).logits[0])
            assert torch.equal(generated[row], model.generate(**alone, **options)[0, -NEW:])
            if handle is not None:
                handle.detach()

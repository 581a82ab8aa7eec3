"""What `attach` says about every class of transformers with a causal head, and whether the first real calls agree.

    python -m tests.hf.every_model        writes the table of decoders in docs/models.md anew
    python -m tests.hf.every_encoder          that of encoders
    python -m tests.hf.every_encoder_decoder  that of encoder-decoders

A class works if virtual tokens made of a text act as the model does that reads the text: in a forward, in a short
`generate` with padding, and after a step of training, when embeddings belong to no token any more.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.attention.discover import has_other_layers
from prefixcore.hf.positions.model_inputs import has_axes, reads_ids, stand_in
from prefixcore.hf.tested_classes import PACKED

from .columns import columns
from .hybrids import hybrid_fault
from .tiny_models import every_class, make

TEXT, PADDING, NEW = 3, 2, 3
TOLERANCE = 2e-3
"""The share of the text's effect that may be missing."""


@dataclass(frozen=True)
class Verdict:
    """What `attach` says of one class and one method.

    Attributes:
        works: whether it attached.
        reason: why not, in its words.
        fault: what then went wrong, which nothing may; None: all was right.
    """

    works: bool
    reason: str = ""
    fault: str | None = None


def judge(name: str, model_type: str, method: str, **changes: Any) -> Verdict:
    """The verdict on one class; `method` is "prefix" or "soft prompt", `changes` are fields of its configuration."""
    model = make(name, model_type, **changes)
    try:
        handle = _attach(model, method)
    except (NotImplementedError, ValueError) as error:
        if not is_ours(error):
            return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
        return Verdict(False, str(error))
    except Exception as error:
        return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
    text = text_ids()
    if method == "soft prompt" and reads_ids(model) and not has_axes(model):
        handle.detach()  # the model sees stand-ins for virtual tokens, so the text to compare with is of these
        text = torch.full((TEXT,), stand_in(model))
        handle = _attach(model, method, stand_in(model))
    bare = make(name, model_type, **changes)
    if method == "prefix" and has_other_layers(model, handle._bank.layers):
        return Verdict(True, "hybrid", _hybrid_fault(model, handle, bare, text))
    return Verdict(True, fault=_fault(model, handle, bare, text))


def _hybrid_fault(model: Any, handle: Any, bare: Any, text: Tensor) -> str | None:
    try:
        return hybrid_fault(model, handle, bare) or _check_training(model, handle, bare, text, _ids())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def is_ours(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "/prefixcore/" in trace.tb_frame.f_code.co_filename


def _attach(model: Any, method: str, only: int | None = None) -> Any:
    config = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prefixcore.attach(model, config(init_text="abc"), tokenizer=_Words(only))


class _Words:
    name_or_path = "tests/three-words"

    def __init__(self, only: int | None) -> None:
        self.ids = text_ids().tolist() if only is None else [only] * TEXT

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids}

    def __len__(self) -> int:
        return 128


def text_ids() -> Tensor:
    return torch.tensor([17, 40, 63])


def _ids() -> Tensor:
    return torch.tensor([[11, 58, 33, 70, 22], [44, 9, 66, 13, 51]])


def _fault(model: Any, handle: Any, bare: Any, text: Tensor) -> str | None:
    """The first thing that is wrong with an attached model."""
    ids = _ids()
    text = text.expand(2, -1)
    for what, check in (
        ("forward", _check_forward),
        ("generate", _check_generate),
        ("training", _check_training),
    ):
        try:
            fault = check(model, handle, bare, text, ids)
        except Exception as error:
            return f"{what}: {type(error).__name__}: {error}"
        if fault:
            return f"{what}: {fault}"
    return None


def _check_forward(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    with torch.no_grad():
        try:
            expected = bare(input_ids=torch.cat((text, ids), 1)).logits[:, TEXT:]
            without = bare(input_ids=ids).logits
        except Exception as error:
            return _bare_fault(bare, f"forward: {type(error).__name__}: {error}")
        got = model(input_ids=ids).logits
    return _difference(expected, got, without)


def _check_generate(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    """A batch without padding and one with, on the left: each row as it is by itself, after the text."""
    if not model.can_generate():
        return None
    for padding in (0, PADDING):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        rests = [ids[:1], ids[1:, padding:]]
        longer = [torch.cat((text[:1], rest), 1) for rest in rests]
        batch = torch.cat((longer[0], torch.cat((ids.new_zeros(1, padding), longer[1]), 1)))
        batch_mask = torch.cat((torch.ones_like(text), mask), 1).sort(1).values
        try:
            expected = [_generate(bare, each)[:, 0] for each in longer]
            without = [_generate(bare, rest)[:, 0] for rest in rests]
            batched = _generate(bare, batch, batch_mask)
        except Exception as error:
            return _bare_fault(bare, f"generate: {type(error).__name__}: {error}")
        got = _generate(model, ids * mask, mask)
        for row in range(2):
            if _difference(expected[row], batched[:, row], without[row]):
                _bare_fault(bare, f"generate: {padding} padding tokens in a batch change what is generated")
            elif fault := _difference(expected[row], got[:, row], without[row]):
                return f"{padding} padding tokens, row {row}: {fault}"
    return None


def _generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits [new, B, V] of a greedy generate."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(output.logits)


def _bare_fault(bare: Any, what: str) -> None:
    """Notes what a bare model cannot do, so that nothing is promised."""
    bare_faults.append(f"{type(bare).__name__}: {what}")


bare_faults: list[str] = []
"""What a bare model cannot do, so that nothing is promised."""


def _check_training(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    labels = ids.clone()
    for _ in range(2):
        optimizer.zero_grad()
        output = model(input_ids=ids, labels=labels, use_cache=False)
        output.loss.backward()
        for name, parameter in handle.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0:
                return f"no gradient of {name}"
        for p in handle.parameters():
            p.grad /= p.grad.norm()
        optimizer.step()
    if [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("prefixcore.")]:
        return "a frozen weight has a gradient"
    with torch.no_grad():
        if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
            return "not finite"
    return None


def _difference(expected: Tensor, got: Tensor, without: Tensor) -> str | None:
    effect, missing = (expected - without).float().norm(), (expected - got).float().norm()
    if not missing <= TOLERANCE * effect:
        return f"off by {float(missing):.3g} of {float(effect):.3g}"
    return None


PAGE = Path(__file__).parents[2] / "docs" / "models.md"

TESTED = Path(prefixcore.hf.__file__).parent / "tested_classes.py"

METHODS = "prefix", "soft prompt"

UNTRIED = {
    "BltForCausalLM": "reads bytes, cut into patches by a second model",
    "FastVlmForConditionalGeneration": "needs timm",
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose states it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose states it reads",
    "InklingForConditionalGeneration": "needs scipy",
    "PerceptionLMForConditionalGeneration": "needs timm",
}
"""Classes without a tiny model, and why there is none."""

_REASONS = {
    r"is an encoder-decoder": "an encoder-decoder",
    r"reads (\w+); virtual tokens": r"reads `\1` in place of `input_ids`",
    r"has no attention that a prefix reaches": "no attention interface, no cache",
    r"itself generates otherwise than it reads": "its generate counts positions otherwise than its forward",
    r"generate with padding on the left": "padding on the left would stand between prefix and text",
    r"computes from the text \(position_bias\)": "a bias by position that depends on the text",
    r"calls attention with indices": "each query chooses its keys (`indices`)",
    r"in an argument of its own \((\w+)\)": r"keeps its past in `\1`, in no cache",
    r"input embeddings of \w+ are no tensor": "its embeddings are no tensor",
    r"takes no inputs_embeds": "takes no `inputs_embeds`",
    r"has no attention that calls": "attention of its own, out of reach",
    r"is not causal; in models": "attention is not causal, or does not say so",
    r"takes no position_ids": "takes no `position_ids`",
    r"modules (were reached|write to its cache)": "not one attention call a layer",
    r"should have the sliding window": "its windows are not those of its configuration",
    r"has a window \(config\.(\w+)\)": r"out of reach but for its cache, where `\1` would hide it",
    r"does not act as the text": "not as the text",
    r"position_bias": "a learned bias by position",
    r"the encoder of \w+ has no table": "its encoder has no table of embeddings",
    r"no table of input embeddings": "several tables of embeddings",
    r"no tiny model: (\w+)": r"not tried: its tiny model raises \1",
    r"in its encoder and \d+ times in its decoder": "attention of its own, out of reach",
    r"(\w+) has a value a token": r"generate gives it `\1`",
    r"does not return one output a token": "not one output a token",
    r"calls attention with (\w+)": r"attention takes `\1`",
    r"reads (\w+), whose size": r"reads `\1`, of a size that its configuration does not say",
    r"does not say which two models": "does not say which parts encode and decode",
    r"takes no decoder_input_ids": "takes no `decoder_input_ids`",
    r"reads (\w+); soft prompts": r"reads `\1` in place of `input_ids`",
    r"has \d+ layers, but attention": "not one attention call a layer",
    r"not what it would be if it was concatenated": "not as its own eager attention",
    r"into \d+ rows of attention": "attention within windows of an image",
    r"reads (\w+) and is no encoder": r"reads `\1` in place of `input_ids`",
    r"gets no gradient": "gets no gradient",
    r"has a head that may count": "a head of another kind",
    r"its own code raises (\w+)": r"a few tokens of text, or a short generate, raise \1 in its code",
}
"""What the page says of a refusal, by what the refusal says."""


def cell(verdict: Verdict) -> str:
    """What the page says of a verdict; AssertionError: it is a fault, or a refusal that the page has no words for."""
    assert verdict.fault is None, verdict.fault
    if verdict.works:
        return "works, in its attention layers" if verdict.reason == "hybrid" else "works"
    for pattern, words in _REASONS.items():
        if found := re.search(pattern, verdict.reason):
            return found.expand(words)
    raise AssertionError(f"no words for: {verdict.reason}")


def cells(name: str, model_type: str) -> list[str]:
    """What the page says of a class, by method, and of a prefix on it in the other columns."""
    if name in UNTRIED:
        return [f"not tried: {UNTRIED[name]}"] * len(METHODS) + [""] * 4
    said = [_cell_of(name, model_type, method) for method in METHODS]
    if not said[0].startswith("works"):
        return [*said, "", "", "", ""]
    changes = {"is_decoder": True} if "is_decoder" in said[0] else {}
    return [*said, *columns(make(name, model_type, **changes), make(name, model_type, **changes))]


def _cell_of(name: str, model_type: str, method: str) -> str:
    """What the page says of a class that is an encoder or a decoder, as its configuration says, is of the decoder."""
    verdict = judge(name, model_type, method)
    if "is_decoder=True" not in verdict.reason:
        return cell(verdict)
    said = cell(judge(name, model_type, method, is_decoder=True))
    return f"{said} with `is_decoder=True`" if said.startswith("works") else said


def row(name: str, model_type: str, said: list[str]) -> str:
    return f"| `{name}` | `{model_type}` | {' | '.join(said)} |"


def page_rows() -> dict[str, str]:
    """The rows of the page by class."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


HEADER = "| class | `model_type` | prefix | soft prompt | packs | caches | backend | beside PEFT's prefix |"


def write_table(header: str, rows: list[str]) -> None:
    """Replaces the table of the page that begins with this header."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(header) + 2
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    PAGE.write_text("\n".join([*lines[:first], *rows, *lines[last:]]) + "\n", encoding="utf-8")
    write_tested()


def tested() -> dict[str, set[str]]:
    """The classes of which the page says that they work, by method, and those whose sequences can be packed."""
    found: dict[str, set[str]] = {method: set() for method in (*METHODS, PACKED)}
    for name, line in page_rows().items():
        for method, said in zip(METHODS, line.split(" | ")[2:4], strict=True):
            if said.strip(" |").startswith("works"):
                found[method].add(name)
        if line.count(" | ") == 7 and line.split(" | ")[4] == "yes":
            found[PACKED].add(name)
    return found


def write_tested() -> None:
    """Writes them where `attach` reads which classes it need not warn of."""
    text = TESTED.read_text(encoding="utf-8")
    for name, names in zip(("_PREFIX", "_SOFT_PROMPT", "_PACKED"), tested().values(), strict=True):
        block = textwrap.fill(" ".join(sorted(names)), 116, initial_indent="    ", subsequent_indent="    ")
        text = re.sub(rf'(?s)\n{name} = """.*?"""', f'\n{name} = """\n{block}\n"""', text)
    TESTED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_table(HEADER, [row(name, kind, cells(name, kind)) for name, kind in sorted(every_class().items())])

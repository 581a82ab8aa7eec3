"""`docs/models.md`: a row for each class of transformers, in the words of what `attach` says of it.

`tests.hf.every_model`, `every_encoder` and `every_encoder_decoder` write its tables.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import prefixcore
from prefixcore.hf.tested_classes import PACKED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

WRITTEN_WITH = "5.23"
"""The transformers that the page was written with, and that the counts of classes in the pages are of."""

LATER = {
    "Apertus1p5ForConditionalGeneration",
    "Apertus1p5TextForCausalLM",
    "DoryForCausalLM",
    "HYV4VLForConditionalGeneration",
    "Inkling2LoopForCausalLM",
    "Inkling2LoopForConditionalGeneration",
    "LaraMiniForCausalLM",
}
"""Classes of the page that came with transformers 5.24."""

BAKED = (
    "docs/guides/formats.md",
    r"Of the (\d+) classes of transformers .*? (\d+) take a soft prompt: (\d+) of these bake, .*? (\d+) are refused",
)
"""The page that says how many of these classes take a soft prompt, and how many of those bake, and where it does."""

TESTED = Path(prefixcore.hf.__file__).parent / "tested_classes.py"

METHODS = "prefix", "soft prompt"


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


def row(name: str, model_type: str, said: list[str]) -> str:
    return f"| `{name}` | `{model_type}` | {' | '.join(said)} |"


def said_by(name: str, pattern: str) -> list[int]:
    """The numbers that a page says in the groups of a pattern, which has to be there."""
    said = re.search(pattern, " ".join((PAGE.parents[1] / name).read_text(encoding="utf-8").split()))
    assert said is not None, pattern
    return [int(number) for number in said.groups()]


def page_rows() -> dict[str, str]:
    """The rows of the page by class."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


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
        if line.count(" | ") == 9 and line.split(" | ")[4] == "yes":
            found[PACKED].add(name)
    return found


def write_tested() -> None:
    """Writes them where `attach` reads which classes it need not warn of."""
    text = TESTED.read_text(encoding="utf-8")
    for name, names in zip(("_PREFIX", "_SOFT_PROMPT", "_PACKED"), tested().values(), strict=True):
        block = textwrap.fill(" ".join(sorted(names)), 116, initial_indent="    ", subsequent_indent="    ")
        text = re.sub(rf'(?s)\n{name} = """.*?"""', f'\n{name} = """\n{block}\n"""', text)
    TESTED.write_text(text, encoding="utf-8")

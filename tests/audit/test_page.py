"""The report, its page and its JSON: the same each time, whole, and safe whatever the files hold."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser

import peft
import pytest
import torch

import prefixcore
from prefixcore.audit import AuditError, Report, audit
from prefixcore.audit.wording import visible
from prefixcore.training import DataError, Example
from tests import tiny
from tests.hf.models import make

from .conftest import EXAMPLES

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>&{{ 7 * 7 }}\u202e $\\frac{1}{0}$ ]]>"


@pytest.fixture(scope="module")
def report(model, tokenizer, prefix) -> Report:
    return audit(model, tokenizer, prefix, EXAMPLES, trials=6, instructions=["Swap the letters."])


@pytest.fixture(scope="module")
def page(report) -> str:
    return report.to_html()


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    VOID = ("meta", "img", "br", "source")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace("\u00a0", " ")


def check(page: str) -> Page:
    """Well-formed, with nothing that runs or is fetched, and every figure explained."""
    read = Page(page)
    assert not read.open
    for tag, attributes in read.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "form", "a", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset"):
            assert name not in attributes or attributes[name].startswith("data:image/svg+xml;base64,")
        assert "href" not in attributes
    assert "url(" not in page.partition("<body>")[0]
    figures = sum(tag == "figure" for tag, _ in read.tags)
    assert figures == page.count("It means:</b>") - page.count('<p class="note"><b>It means:')
    assert page.count("It means:") == page.count("It does not mean:")
    return read


def test_it_begins_with_five_sentences_and_ends_with_limits(report, page):
    read = check(page)
    assert len(report.data["summary"]) == 5
    assert all(sentence.endswith(".") for sentence in report.data["summary"])
    assert max(map(read.text.index, report.data["summary"])) < read.text.index("How to read it")
    assert re.findall("<h2>(.*)</h2>", page) == [
        "What the adapter is",
        "In its task",
        "Elsewhere: how far it leaks",
        "Where the model attends to it",
        "What each virtual token does",
        "Nearest words",
        "How large it is",
        "A text in its place",
        "Limits",
    ]
    assert all(limit in read.text for limit in report.data["limits"])
    assert sum(tag == "img" for tag, _ in read.tags) == 7


def test_the_page_is_made_from_the_json_and_nothing_else(report, page):
    assert Report(json.loads(report.to_json())).to_html() == page


def test_the_same_input_gives_the_same_report(report, model, tokenizer, prefix):
    again = audit(model, tokenizer, prefix, EXAMPLES, trials=6, instructions=["Swap the letters."])
    assert again.to_json() == report.to_json()


def test_a_soft_prompt_and_p_tuning(model, tokenizer, prompt, tmp_path):
    assert audit(model, tokenizer, prompt, EXAMPLES[:3], trials=0).data["subject"]["kind"] == "soft prompt"
    with prefixcore.attach(model, prefixcore.PTuningConfig(num_virtual_tokens=1, encoder_hidden_size=4)) as handle:
        handle.save(tmp_path / "p")
    found = audit(model, tokenizer, tmp_path / "p", EXAMPLES[:3], {"letters": EXAMPLES[4:6]}, trials=0)
    assert found.data["subject"]["kind"] == "soft prompt (P-tuning)"
    assert [other["name"] for other in found.data["others"]] == ["letters"]
    check(found.to_html())


def test_what_files_hold_is_text(model, tokenizer, tmp_path):
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="ab"), tokenizer=tokenizer) as handle:
        record = {"data": HOSTILE, "end": "\n", "options": {HOSTILE: float("nan"), "b": [float("inf"), None]}}
        handle.save(tmp_path / "bad", task=HOSTILE, record=record)
    probes = [Example(f"{i}{HOSTILE}"[:90], HOSTILE[:20]) for i in range(4)]
    found = audit(
        model,
        tokenizer,
        tmp_path / "bad",
        probes,
        {HOSTILE: [Example(f"other {probe.prompt}", probe.completion) for probe in probes]},
        instructions=[HOSTILE[:30]],
        trials=2,
        name=HOSTILE,
    )
    page = found.to_html()
    read = check(page)
    assert visible(HOSTILE) in read.text
    assert "\u202e" not in page
    assert "49" not in re.findall(r"&amp;(\S+)", page)
    for tag, attributes in read.tags:
        if tag == "img":
            svg = base64.b64decode(attributes["src"].partition(",")[2]).decode()
            assert "<script" not in svg
            assert "onerror=alert" not in re.sub(r">[^<]*<", "><", svg)


def test_tokens_that_are_markup_are_text(report):
    data = copy.deepcopy(report.data)
    for where in ("promoted", "suppressed", "gained", "lost"):
        for row in data["promoted"]["first"][where]:
            row["text"] = HOSTILE
    for kind in data["nearest"]["kinds"].values():
        for row in kind["tokens"]:
            for token in row:
                token["text"] = "$x$<b onclick=1>"
    data["nearest"]["start"] = [{"id": 0, "text": "</svg><script>"}] * data["subject"]["num_virtual_tokens"]
    check(Report(data).to_html())


def test_a_lone_surrogate_is_written_as_its_escape(report, tmp_path):
    data = copy.deepcopy(report.data)
    data["subject"]["intended_use"] = "half \ud800"
    page, twin = Report(data).write(tmp_path / "deep" / "page.html")
    assert "half \\ud800" in page.read_text(encoding="utf-8")
    assert json.loads(twin.read_text(encoding="utf-8"))["subject"]["intended_use"] == "half \ud800"
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "page.json"]


def test_what_cannot_be_measured_is_said(model, tokenizer, tmp_path):
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=2, layers=[1], modules_to_save=["lm_head"])
    with prefixcore.attach(model, config) as handle:
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                if "lm_head" in name:
                    parameter.add_(1)
                    parameter[3:9].mul_(-2)
        handle.save(tmp_path / "head")
    found = audit(model, tokenizer, tmp_path / "head", EXAMPLES[:4], trials=0)
    assert "differ by" in found.data["attention"]["not_measured"]
    assert "leaves out the first attention layer" in found.data["nearest"]["not_measured"]
    assert "lm_head" in found.data["subject"]["modules_trained_along"][0]
    read = check(found.to_html())
    assert "not measured" in read.text


def test_a_prefix_that_leaves_layers_out(model, tokenizer, tmp_path):
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2, layers=[1])) as handle:
        handle.save(tmp_path / "later")
    found = audit(model, tokenizer, tmp_path / "later", EXAMPLES[:4], trials=0)
    assert found.data["attention"]["by_head"][0] == [0.0] * 4
    assert min(found.data["attention"]["by_head"][1]) > 0


def test_the_model_is_left_as_it_was(model, tokenizer, prompt):
    from tests.hf.models import assert_same, state

    model.train()
    before = state(model)
    audit(model, tokenizer, prompt, EXAMPLES[:3], trials=2)
    assert_same(before, state(model))
    model.eval()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (prefixcore.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2), "method is multitask-prompt"),
        (prefixcore.PromptTuningConfig(num_virtual_tokens=1, virtual_token_ids=3), "stands within the text"),
    ],
)
def test_other_methods_are_refused_in_words(model, tokenizer, tmp_path, config, message):
    with prefixcore.attach(model, config, tokenizer=tokenizer) as handle:
        handle.save(tmp_path / "other")
    with pytest.raises(AuditError, match=message):
        audit(model, tokenizer, tmp_path / "other", EXAMPLES)


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_an_adapter_that_peft_wrote(model, tokenizer, tmp_path, method):
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "theirs")
    found = audit(model, tokenizer, tmp_path / "theirs", EXAMPLES[:4], trials=2)
    assert found.data["subject"]["written_by"] == "PEFT"
    assert found.data["agreement"]["largest_difference"] < 1e-3
    check(found.to_html())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_other_families_and_dtypes(tokenizer, tmp_path, family, method):
    """A table of few positions, into which not every built-in text fits; soft caps; bfloat16."""
    other = make(family)
    other.resize_token_embeddings(98)
    other.to(torch.bfloat16 if family == "gemma2" else torch.float32)
    with prefixcore.attach(other, getattr(prefixcore, method)(num_virtual_tokens=3)) as handle:
        handle.save(tmp_path / "adapter")
    found = audit(other, tokenizer, tmp_path / "adapter", EXAMPLES[:4], trials=2).data
    for name in ("agreement", "attention", "leave_one_out", "nearest"):
        assert "not_measured" not in found[name], name
    if family == "gpt2":
        assert 0 < found["others"][0]["used"] < 16
        assert any("texts that fit" in limit for limit in found["limits"])


def test_bad_probes_are_named(model, tokenizer, prefix):
    with pytest.raises(AuditError, match="at least one prompt"):
        audit(model, tokenizer, prefix, [])
    with pytest.raises(DataError, match=r"line 7: 1\d\d tokens, more than the limit of 119"):
        audit(model, tokenizer, prefix, [Example("a" * 130, " b", "line 7")])
    with pytest.raises(DataError, match="line 7: 100,002 characters, far more"):
        audit(model, tokenizer, prefix, [Example("a" * 100000, " b", "line 7")])
    with pytest.raises(DataError, match="the prompt has no token"):
        audit(model, tokenizer, prefix, [Example("", " b", "line 7")])
    other = tiny.tokenizer()
    other.add_tokens(["zz"])
    with pytest.raises(AuditError, match="tokenizer is another model's"):
        audit(model, other, prefix, [Example("zz", " b", "line 7")])


def test_limits_say_what_was_left_out(model, tokenizer, prefix):
    found = audit(model, tokenizer, prefix, EXAMPLES, examples=EXAMPLES[:5], limit=4, trials=0)
    text = " ".join(found.data["limits"])
    assert "Of probes 4 of 12 were used" in text
    assert "4 probes are among the examples" in text
    assert "does not state: its licence, its intended use" in text
    assert "sixteen short texts" in text


def test_numbers_that_are_not_finite_are_refused(model, tokenizer, tmp_path):
    broken = copy.deepcopy(model)
    with prefixcore.attach(broken, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
        handle.save(tmp_path / "good")
    broken.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(AuditError, match="not finite on probes: take another dtype"):
        audit(broken, tokenizer, tmp_path / "good", EXAMPLES[:2], trials=0, strict=False)

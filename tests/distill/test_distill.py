"""A long text as a short prefix, from prompts to the adapter."""

from __future__ import annotations

import math

import pytest
import torch

import prefixcore
from prefixcore.distill import DistillError, DistillOptions, Prompt, distill
from prefixcore.distill import targets as targets_module
from prefixcore.distill.divergence import tops
from prefixcore.distill.front import Front, Reader
from prefixcore.distill.learning import divergences
from prefixcore.distill.report import CUT, FULL, NOTHING, PREFIX, START, Report
from prefixcore.distill.scores import Score, is_right
from prefixcore.distill.store import Store
from prefixcore.distill.student import comparable
from prefixcore.distill.targets import Teacher
from prefixcore.distill.writing import writer
from prefixcore.hf.handle import Handle
from prefixcore.training import weights_digest
from tests import tiny
from tests.distill.conftest import OWN_SYSTEM, TEXT
from tests.hf import models

OPTIONS = {"num_virtual_tokens": 6, "questions": 0, "max_answer_tokens": 4, "steps": 30, "learning_rate": 0.02}


def teach(model, tokenizer, prompts, folder=None, **options):
    options = DistillOptions(**{**OPTIONS, **options})
    written = writer(tokenizer, TEXT, chat=False)
    front = Front.of(model, written.front)
    teacher = Teacher(model, tokenizer, front, "digest", 0, options, Store(folder))
    return teacher.targets([written.ask(prompt) for prompt in prompts], greedy=True)


def test_the_prefix_learns_what_the_text_does(model, tokenizer, prompts):
    before = weights_digest(model)
    options = DistillOptions(**OPTIONS, start="spread")
    distilled = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    scores, report = distilled.report.scores, distilled.report
    assert list(scores) == [FULL, PREFIX, START, CUT, NOTHING]
    assert [score.tokens for score in scores.values()] == [44, 6, 6, 6, 0]
    assert (scores[FULL].agreement, scores[FULL].token_agreement, scores[FULL].divergence) == (1, 1, 0)
    assert scores[PREFIX].divergence < 0.8 * scores[START].divergence
    assert scores[PREFIX].divergence < 0.8 * scores[CUT].divergence
    assert 0 <= scores[NOTHING].accuracy <= 1
    assert report.tokens_saved == 38
    assert report.prompts == {"training": 29, "validation": 3, "held_out": 8}
    assert report.prefill_saved == report.prefill_seconds[FULL] - report.prefill_seconds[PREFIX]
    assert len(distilled.record.train_loss) == 30
    distilled.handle.detach()
    assert weights_digest(model) == before


def test_conversations_whose_requests_begin_with_a_system_message_of_the_templates_own(model, tokenizer):
    """The text stands in its place before the teacher; the start knows of it."""
    tokenizer.chat_template = OWN_SYSTEM
    asked = [Prompt(f"{a}{b}") for a in "abcde" for b in "stuvwxyz"]
    options = DistillOptions(**{**OPTIONS, "num_virtual_tokens": 12, "steps": 1}, chat=True)
    report = distill(model, tokenizer, TEXT, options=options, prompts=asked).report
    assert report.start["kind"] == "match"
    assert report.scores[FULL].tokens == len(tokenizer("[system]" + TEXT + "<end>[user]")["input_ids"])
    assert report.scores[START].divergence < 0.3 * report.scores[CUT].divergence


def test_the_adapter_is_one_as_any_other(model, tokenizer, prompts, tmp_path):
    options = DistillOptions(**{**OPTIONS, "steps": 3})
    distilled = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    folder = distilled.save(tmp_path / "adapter", name="capitals.txt", task="capitals")
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    distilled.handle.detach()
    with prefixcore.load(model, folder):
        torch.testing.assert_close(model(ids).logits, expected)
    manifest = prefixcore.adapters.read_adapter(folder).manifest
    assert manifest.task == "capitals"
    assert manifest.metrics["agreement"] == distilled.report.scores[PREFIX].agreement
    assert manifest.split["examples"] == 8
    assert manifest.training["context_tokens"] == 44
    record = prefixcore.adapters.read_record(folder)
    assert record["distilled"]["scores"][CUT]["tokens"] == 6
    assert (folder / "curve.png").read_bytes()[1:4] == b"PNG"


def test_two_runs_are_the_same(model, tokenizer, prompts):
    options = DistillOptions(**{**OPTIONS, "steps": 3})
    first = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    first.handle.detach()
    again = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    assert again.record.train_loss == first.record.train_loss
    for (key, value), (other_key, other_value) in zip(again.handle.bake(), first.handle.bake(), strict=True):
        assert torch.equal(key, other_key)
        assert torch.equal(value, other_value)


def test_targets_are_the_answers_behind_the_text(model, tokenizer, prompts):
    targets = teach(model, tokenizer, prompts[:5], top_k=97)
    ids = writer(tokenizer, TEXT, chat=False).front
    for target in targets:
        whole = torch.tensor([ids + target.asked.behind + target.answer])
        logits = model(whole).logits[0, -len(target.answer) - 1 : -1]
        assert logits.argmax(-1).tolist() == target.answer
        expected = logits.log_softmax(-1).gather(-1, target.top_ids)
        torch.testing.assert_close(target.top_log_probs, expected, atol=1e-4, rtol=1e-4)
    with Front.of(model, ids).before(model) as reader:
        assert divergences(reader, targets, 0).abs().max() < 1e-3
    assert tops(targets, torch.device("cpu"))[0].shape[1] == 97


def test_a_distillation_that_was_stopped_goes_on(model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(targets_module, "TOGETHER", 8)
    expected = teach(model, tokenizer, prompts)
    made, real = [], targets_module.answer

    def answer(*args, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args, **options)

    monkeypatch.setattr(targets_module, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        teach(model, tokenizer, prompts, tmp_path)
    assert not hasattr(model, "prefixcore")
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(targets_module, "answer", real)
    found = teach(model, tokenizer, prompts, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert [target.answer for target in found] == [target.answer for target in expected]
    monkeypatch.setattr(targets_module, "answer", lambda *args, **options: pytest.fail("answered again"))
    again = teach(model, tokenizer, prompts, tmp_path)
    assert all(torch.equal(a.top_log_probs, b.top_log_probs) for a, b in zip(again, found, strict=True))


def test_padded_batches_give_the_same_loss(model, tokenizer, prompts, monkeypatch):
    targets = teach(model, tokenizer, prompts[:6])
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0)):
        packed = divergences(Reader(model, [], packed=True), targets, 0)
        padded = divergences(Reader(model, [], packed=False), targets, 0)
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(Handle, "can_pack", property(lambda handle: False))
    options = DistillOptions(**{**OPTIONS, "steps": 2})
    distilled = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    assert math.isfinite(distilled.report.scores[PREFIX].divergence)


def test_the_least_that_keeps_a_share(model, tokenizer, prompts):
    options = {**OPTIONS, "num_virtual_tokens": 8}
    plain = [Prompt(prompt.text) for prompt in prompts]
    distilled = distill(model, tokenizer, TEXT, options=DistillOptions(**options, least_share=0.01), prompts=plain)
    report = distilled.report
    assert [trial.num_virtual_tokens for trial in report.trials][:2] == [8, 4]
    kept = [trial.num_virtual_tokens for trial in report.trials if trial.share >= 0.01]
    assert report.share_kept
    assert report.num_virtual_tokens == distilled.handle.num_virtual_tokens == min(kept)
    distilled.handle.detach()
    options |= {"start": "first", "steps": 1}
    distilled = distill(model, tokenizer, TEXT, options=DistillOptions(**options, least_share=1.0), prompts=plain)
    assert (distilled.report.share_kept, distilled.handle.num_virtual_tokens) == (False, 8)
    assert "no P that was tried" in distilled.report.notes()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text has no token"),
        ("abc", "6 virtual tokens save nothing of a text of 3 tokens"),
        ("a" * 126, "more than the 128 positions"),
        ("a" * 120, "the text and the longest prompt: 120 tokens and 9 behind them"),
    ],
)
def test_what_cannot_be_distilled_is_refused(model, tokenizer, text, message):
    options = DistillOptions(**OPTIONS)
    prompts = [Prompt("abcde"), Prompt("b"), Prompt("c")]
    with pytest.raises(DistillError, match=message):
        distill(model, tokenizer, text, options=options, prompts=prompts)
    assert not hasattr(model, "prefixcore")


def test_a_model_that_does_not_go_on_with_a_text(tmp_path):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny.encoder_folder(tmp_path / "bert"))
    with pytest.raises(NotImplementedError, match="does not go on with a text"):
        distill(model, tiny.tokenizer(), TEXT, options=DistillOptions(num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_virtual_tokens", 0),
        ("questions", -1),
        ("top_k", True),
        ("start", "last"),
        ("match", "same"),
        ("learning_rate", math.nan),
        ("temperature", -1.0),
        ("eval_fraction", 1.0),
        ("least_share", 0.0),
        ("num_frozen_tokens", 6),
        ("end", ""),
    ],
)
def test_options_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        DistillOptions(**{**OPTIONS, field: value})


def test_when_an_answer_is_right():
    exact = DistillOptions(num_virtual_tokens=1, end="\n")
    contains = DistillOptions(num_virtual_tokens=1, match="contains")
    assert is_right(" Lima ", " Lima\nand", exact)
    assert not is_right("In Lima", " Lima", exact)
    assert is_right("It is lima, I think.", " Lima", contains)


def test_answers_are_kept_by_the_configuration_too(model, tokenizer, prompts, tmp_path):
    """It decides what the model says, as the weights do."""
    options = DistillOptions(**{**OPTIONS, "steps": 1})

    def files():
        distill(model, tokenizer, TEXT, options=options, prompts=prompts, cache=tmp_path).handle.detach()
        return len(list(tmp_path.iterdir()))

    once = files()
    assert files() == once
    model.config.rms_norm_eps *= 10
    assert files() == 2 * once
    model.generation_config.eos_token_id = 7
    assert files() == 3 * once


def test_a_text_that_begins_with_white_space_is_cut_where_it_says_something(model, tokenizer, prompts):
    options = DistillOptions(**{**OPTIONS, "num_virtual_tokens": 2, "steps": 1})
    distilled = distill(model, tokenizer, "\n\n\n" + TEXT, options=options, prompts=prompts)
    assert distilled.report.scores[CUT].tokens == 4


def test_a_text_that_nearly_fills_the_model_is_asked_about_as_far_as_there_is_room(tokenizer):
    """Learned positions end: a question behind a part of the text, and its answer behind the whole, are to fit."""
    model = models.make("gpt2", vocab_size=len(tokenizer), n_positions=128)
    options = DistillOptions(**{**OPTIONS, "questions": 64, "steps": 1})
    said: list[str] = []
    distilled = distill(model, tokenizer, TEXT * 2 + "x" * 12, options=options, say=said.append)
    assert sum(distilled.report.prompts.values()) > 8
    assert "leave no room for an answer" in said[0]


def test_ids_of_another_models_tokenizer_are_named(tokenizer, prompts):
    options = DistillOptions(**OPTIONS)
    with pytest.raises(DistillError, match=r"the text has the token id \d+, but the model's vocabulary has 20"):
        distill(models.make("gemma2", vocab_size=20), tokenizer, TEXT, options=options, prompts=prompts)
    small, text = models.make("llama", vocab_size=len(tokenizer) - 1), TEXT.replace("\n", " ")
    prompts = [Prompt("a\n", None, "prompt 0"), *prompts]
    with pytest.raises(DistillError, match=r"prompt 0 has the token id \d+"):
        distill(small, tokenizer, text, options=options, prompts=prompts)


def test_answers_are_the_likeliest_tokens_whatever_the_model_sets(model, tokenizer, prompts):
    """Chat models come with penalties and beams; what is kept, and compared, are greedy answers."""
    plain = teach(model, tokenizer, prompts[:4])
    settings = {"repetition_penalty": 50.0, "num_beams": 2, "no_repeat_ngram_size": 1, "return_dict_in_generate": True}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    found = teach(model, tokenizer, prompts[:4])
    assert [target.answer for target in found] == [target.answer for target in plain]
    assert all(target.answer == target.top_ids[:, 0].tolist() for target in found)


def test_a_prefix_that_keeps_little_is_said_to():
    """Less than half of the right answers that the text brings, or of the equal tokens where there are none."""

    def report(full, own, nothing):
        scores = {FULL: full, PREFIX: own, CUT: nothing, NOTHING: nothing}
        return Report(100, 8, {"training": 1, "validation": 1, "held_out": 1}, scores)

    def score(tokens, right):
        return Score(8, 0.5, tokens, 0.1, right, [])

    little = report(score(1.0, 0.4), score(0.9, 0.1), score(0.5, 0.0))
    assert little.kept == ("right answers", pytest.approx(0.25))
    assert "keeps 25% of the right answers that the text brings" in little.notes()[-1]
    enough = report(score(1.0, 0.4), score(0.9, 0.3), score(0.5, 0.0))
    assert enough.kept == ("right answers", pytest.approx(0.75))
    assert enough.notes() == []
    # Where the text makes none right that nothing does not, or nobody says what is right, tokens count.
    for right in (0.0, None):
        found = report(score(1.0, right), score(0.6, right), score(0.5, right))
        assert found.kept == ("equal tokens", pytest.approx(0.2))
        assert "keeps 20% of the equal tokens" in found.notes()[-1]
    assert report(score(1.0, None), score(1.0, None), score(1.0, None)).kept is None
    worse = report(score(1.0, None), score(0.4, None), score(0.5, None))
    assert "keeps 0% of" in worse.notes()[-1]
    assert Report(100, 8, {}).kept is None


def learned_positions(dropout=0.0):
    """A tiny GPT-2, whose keys cannot be moved."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "eos_token_id": 0, "bos_token_id": 0}
    rates = {"attn_pdrop": 0.0, "resid_pdrop": dropout, "embd_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=98, **sizes, **rates)).eval()


def test_a_start_that_is_not_what_was_asked_for_is_said(tokenizer, prompts):
    """While it runs, in the notes, and in the record."""
    said = []
    options = DistillOptions(**{**OPTIONS, "steps": 1})
    report = distill(learned_positions(), tokenizer, TEXT, options=options, prompts=prompts, say=said.append).report
    why = report.start["why"]
    assert why.startswith("it starts from the first tokens, not from 'match' (GPT2LMHeadModel has learned positions")
    assert why in report.notes()
    assert f"P = 6: {why}" in said


def test_the_teacher_answers_without_dropout(tokenizer, prompts):
    """Also where the model is in training mode, in which it is left."""
    options = DistillOptions(**{**OPTIONS, "steps": 1})
    model = learned_positions(dropout=0.5)
    expected = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    expected.handle.detach()
    assert not model.training
    model.train()
    found = distill(model, tokenizer, TEXT, options=options, prompts=prompts)
    assert model.training
    for a, b in zip(expected.taught, found.taught, strict=True):
        assert torch.equal(a.top_log_probs, b.top_log_probs)


def test_the_share_is_of_what_can_be_shared(model, tokenizer, prompts):
    """Of right answers only where every prompt has one, and where the full text gets one right."""
    half = teach(model, tokenizer, prompts[:4])
    every = [target for target in half if target.asked.prompt.completion is not None]
    own, full, nothing = (Score(8, 0.5, 0.75, 0.1, right, []) for right in (0.25, 0.5, 0.0))
    assert comparable(own, full, every) == (0.25, 0.5)
    assert comparable(own, full, half) == (0.75, 0.75)
    assert comparable(nothing, nothing, every) == (0.75, 0.75)


def test_a_request_that_the_model_cannot_read_is_refused(model, tokenizer, prompts, monkeypatch):
    """A template may write more before a request that comes alone than behind the text."""
    from prefixcore.distill import writing

    real = writing.Plain.ask

    def ask(self, prompt):
        asked = real(self, prompt)
        return writing.Asked(prompt, asked.behind, [5] * 119 + asked.behind)

    monkeypatch.setattr(writing.Plain, "ask", ask)
    with pytest.raises(DistillError, match="the prefix and the longest request: 6 tokens and 128 behind"):
        distill(model, tokenizer, TEXT, options=DistillOptions(**OPTIONS), prompts=prompts)


def test_answers_of_another_ending_are_not_taken(model, tokenizer, prompts, tmp_path):
    """The tokenizer, which no digest of the model knows, says at which token an answer ends."""
    first = teach(model, tokenizer, prompts[:4], tmp_path)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0].answer[1])
    again = teach(model, tokenizer, prompts[:4], tmp_path)
    assert again[0].answer == first[0].answer[:2]

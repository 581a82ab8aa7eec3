"""Tuning: candidates in one batch learn what each learns alone, the better half goes on, and the time is kept."""

from __future__ import annotations

import time

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.training import Example, TokenizedExample, TrainingOptions, tokenize, train
from prefixcore.training.batch import Batch, loss_of
from prefixcore.training.tuning import Candidate, Trial, Tuning, draw_tuning, grid, tune
from prefixcore.training.tuning.at_once import TIMES, AtOnce
from prefixcore.training.tuning.together import Together, groups
from tests import tiny

TEXTS = [(f"{a}{b} ->", f" {b}{a}") for a in "abcd" for b in "xyz"]
EXAMPLES = tokenize(tiny.tokenizer(), [Example(*text) for text in TEXTS], end="\n")
PROMPTS = [TokenizedExample(example.prompt_ids[:1], example.prompt_ids[1:]) for example in EXAMPLES]
CONFIGS = [
    PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0),
    PromptTuningConfig(num_virtual_tokens=3, init="random", seed=0),
    PTuningConfig(num_virtual_tokens=3, init="random", seed=0, encoder_hidden_size=8),
]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_candidate_learns_in_company_what_it_learns_alone(config, packed, weight):
    """Loss and gradient, of two lengths."""
    model = tiny.model().double().train()
    candidates = grid(config, [2, 5], [1e-3])
    with prefixcore.PromptBank(model) as bank:
        for i, candidate in enumerate(candidates):
            bank.attach(f"candidate-{i}", candidate.config).module.double()
        together = Together(model, 0, packed=packed, prompt_loss_weight=weight)
        [(losses, answers)] = together.losses([bank.names], EXAMPLES[:3])
        losses.sum().backward()
        gradients = [[p.grad.clone() for p in bank[name].parameters()] for name in bank.names]
    for i, candidate in enumerate(candidates):
        with prefixcore.attach(model, candidate.config) as handle:
            handle.module.double()
            batch = Batch.of(EXAMPLES[:3], 0, packed=packed, device=torch.device("cpu"))
            answer = loss_of(model, batch)  # in float32, whatever the model is in
            prompts = loss_of(model, Batch.of(PROMPTS[:3], 0, packed=packed, device=torch.device("cpu")))
            loss = answer + weight * prompts
            loss.backward()
            assert float(losses[i].detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
            assert float(answers[i].detach()) == pytest.approx(float(answer.detach()), rel=1e-6)
            for got, parameter in zip(gradients[i], handle.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-8)


def test_one_candidate_is_trained_as_train_trains_it():
    config = PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0)
    options = {"batch_size": 4, "seed": 3}
    with prefixcore.PromptBank(tiny.model()) as bank:
        found = tune(bank, tiny.tokenizer(), [Candidate(0.02, config)], EXAMPLES[:9], EXAMPLES[9:], seconds=60,
                     most_steps=8, **options)  # fmt: skip
        assert found.best.steps == 8
        record = found.best.record(**options)
        baked = bank[found.best.name].bake()
    with prefixcore.attach(tiny.model(), config) as handle:
        training = TrainingOptions(steps=8, learning_rate=0.02, eval_every=2, keep="best", **options)
        expected = train(handle, tiny.tokenizer(), EXAMPLES[:9], held_out=EXAMPLES[9:], options=training)
        assert [x for _, x in record.train_loss] == pytest.approx([x for _, x in expected.train_loss], rel=1e-5)
        assert dict(record.held_out_loss) == pytest.approx(dict(expected.held_out_loss), rel=1e-5)
        assert record.kept_step == expected.kept_step
        for one, other in zip(baked, handle.bake(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_better_half_goes_on_and_the_best_stays_with_its_best_values():
    rates = [1e-6, 1e-4, 3e-2, 1e-5]
    candidates = grid(PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0), [3], rates)
    rungs = []
    with prefixcore.PromptBank(tiny.model()) as bank:
        found = tune(bank, tiny.tokenizer(), candidates, EXAMPLES[:9], EXAMPLES[9:], seconds=60, most_steps=28,
                     on_rung=lambda rung, best: rungs.append(best.candidate.learning_rate))  # fmt: skip
        assert bank.names == [found.best.name]
        (kept,) = Together(bank.model, 0, packed=True).held_out(bank.names, EXAMPLES[9:])
    assert [(rung.candidates, rung.steps) for rung in found.rungs] == [(4, 4), (2, 8), (1, 16)]
    assert found.best.candidate.learning_rate == 3e-2 == rungs[-1]
    assert kept == pytest.approx(found.best.best[1], rel=1e-5)
    assert [trial.rung for trial in found.trials] == [3, 2, 1, 1]
    assert [trial.steps for trial in found.trials] == [28, 12, 4, 4]
    assert len(found.to_dict()["trials"]) == 4


def test_how_many_share_a_batch_changes_nothing_that_is_learnt(monkeypatch):
    losses = []
    for most in (1, 4):
        monkeypatch.setattr("prefixcore.training.tuning.at_once.MOST_TOKENS", most * 40)
        candidates = grid(PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0), [2, 3], [1e-3, 1e-2])
        with prefixcore.PromptBank(tiny.model()) as bank:
            found = tune(bank, tiny.tokenizer(), candidates, EXAMPLES[:8], EXAMPLES[8:], seconds=60, most_steps=49,
                         batch_size=4)  # fmt: skip
            assert max(found.step_seconds) == most
            losses.append({trial.candidate.name: trial.held_out_loss for trial in found.trials})
    for name, values in losses[0].items():
        assert dict(values) == pytest.approx(dict(losses[1][name]), rel=1e-4)


def test_the_time_is_kept():
    candidates = grid(PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0), [2, 3], [1e-3, 1e-2])
    with prefixcore.PromptBank(tiny.model()) as bank:
        began = time.perf_counter()
        found = tune(bank, tiny.tokenizer(), candidates, EXAMPLES[:9], EXAMPLES[9:], seconds=1.5)
        taken = time.perf_counter() - began
    assert 0.5 < taken < 4
    assert found.best.steps >= len(found.rungs)  # on a busy machine no more than one in each
    assert len(found.rungs) == 3


def test_a_candidate_that_diverges_harms_no_other():
    candidates = grid(PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0), [3], [1e-2, 1e38])
    with prefixcore.PromptBank(tiny.model()) as bank:
        found = tune(bank, tiny.tokenizer(), candidates, EXAMPLES[:9], EXAMPLES[9:], seconds=60, most_steps=9)
        assert found.best.candidate.learning_rate == 1e-2
        assert found.best.best[1] < found.best.held_out_loss[0][1]


def test_the_quickest_number_in_one_batch_is_taken():
    choose = AtOnce(8, tokens=100)
    seconds = {1: 4.0, 2: 3.0, 4: 2.0, 8: 2.5}
    for _ in range(TIMES * len(seconds)):
        count = choose(8)
        choose.note(count, 8, 8 * seconds[count])
    assert choose(8) == 4
    assert choose(2) == 2
    assert choose.table() == seconds
    assert list(AtOnce(8, tokens=5000).seconds) == [1, 2, 3]


def test_parts_are_of_equal_size():
    assert groups("abcdefg", 3) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert groups("abcdef", 4) == [["a", "b", "c"], ["d", "e", "f"]]


def test_what_is_wrong_is_said_before_any_work():
    candidates = grid(CONFIGS[0], [2], [1e-3])
    with prefixcore.PromptBank(tiny.model()) as bank:
        arguments = (bank, tiny.tokenizer())
        with pytest.raises(ValueError, match="candidates: expected at least one"):
            tune(*arguments, [], EXAMPLES, EXAMPLES, seconds=1)
        with pytest.raises(ValueError, match="held_out: expected at least one"):
            tune(*arguments, candidates, EXAMPLES, [], seconds=1)
        with pytest.raises(ValueError, match="seconds must be a finite number above 0"):
            tune(*arguments, candidates, EXAMPLES, EXAMPLES, seconds=0)
        bank.attach("mine", CONFIGS[0])
        with pytest.raises(ValueError, match="the bank must hold nothing, and it has mine"):
            tune(*arguments, candidates, EXAMPLES, EXAMPLES, seconds=1)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
        Candidate(float("nan"), CONFIGS[0])


def test_the_picture_shows_what_diverged_too():
    trials = [
        Trial(Candidate(rate, CONFIGS[0]), str(rate), [(0, 3.0), (5, loss)])
        for rate, loss in ((1e-3, 2.0), (1e-2, float("nan")), (1e-1, float("inf")))
    ]
    assert draw_tuning(Tuning(trials, [], 1.0, {}), title="t")[1:4] == b"PNG"

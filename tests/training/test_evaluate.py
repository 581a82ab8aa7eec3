"""Held-out loss and greedy answers, against a model whose every answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prefixcore.training import Evaluation, Example, TokenizedExample, evaluate, held_out_loss, predict, tokenize
from prefixcore.training.data import IGNORED
from prefixcore.training.evaluate import exact_match, is_right
from tests import tiny


def test_the_loss_counts_every_completion_token_once():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    examples = [Example("a", "bcdef"), Example("abcdef", "g"), Example("ab", "cd")]
    rows = tokenize(tokenizer, examples)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        scores = model(ids).logits[0].log_softmax(-1).detach()
        for position, token in enumerate(row.completion_ids, start=len(row.prompt_ids)):
            total -= float(scores[position - 1, token])
            count += 1
    for batch_size in (1, 2, 3):
        loss = held_out_loss(model, rows, pad_token_id=0, batch_size=batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_batches_answer_as_single_prompts_do():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    prompts = ["a", "hello there", "xyz", "Portugal ->"]
    alone = [predict(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    together = predict(model, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    assert together == alone
    assert len(set(alone)) > 1


def test_the_mode_of_the_model_is_put_back():
    tokenizer, model = tiny.tokenizer(), tiny.model().train()
    predict(model, tokenizer, ["a"], max_new_tokens=1)
    assert model.training


class Parrot(nn.Module):
    """Generates fixed text, and scores every token alike."""

    def __init__(self, tokenizer, sayings):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.sayings, self.options = tokenizer, sayings, []

    def forward(self, input_ids, attention_mask, labels, use_cache):
        assert (labels != IGNORED).any()
        return SimpleNamespace(loss=torch.tensor(2.0))

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        self.options.append({"max_new_tokens": max_new_tokens, **options})
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()])
            said = self.tokenizer(self.sayings[prompt])["input_ids"][:max_new_tokens]
            rows.append(row.tolist() + said + [0] * (max_new_tokens - len(said)))
        return torch.tensor(rows)


def test_exact_match_cuts_at_the_end_and_ignores_outer_white_space():
    tokenizer = tiny.tokenizer()
    examples = [Example("A ->", " Lima\n"), Example("B ->", " Oslo\n"), Example("C ->", " Rome\n")]
    sayings = {"A ->": " Lima\nMore", "B ->": " Osl", "C ->": "Rome  \n"}
    model = Parrot(tokenizer, sayings)
    result = evaluate(model, tokenizer, examples, tokenize(tokenizer, examples, end="\n"), end="\n")
    assert result == Evaluation(loss=2.0, exact_match=2 / 3, answers=[" Lima", " Osl", "Rome  "])
    (options,) = model.options
    assert options["do_sample"] is False
    assert options["stop_strings"] == ["\n"]
    assert options["max_new_tokens"] == len(" Lima\n") + 1


def test_an_answer_that_goes_on_is_wrong():
    tokenizer = tiny.tokenizer()
    examples = [Example("A ->", " San")]
    model = Parrot(tokenizer, {"A ->": " San Juan"})
    rows = tokenize(tokenizer, examples)
    assert evaluate(model, tokenizer, examples, rows).exact_match == 0.0


def test_right_is_to_the_letter():
    assert is_right(" Lima", Example("", "Lima\n"))
    assert not is_right("lima", Example("", "Lima"))
    assert not is_right("", Example("", "Lima"))
    assert exact_match(["a", "b"], [Example("", "a"), Example("", "c")]) == 0.5


def test_generation_stops_at_the_end_text():
    tokenizer, model = tiny.tokenizer(), tiny.model()
    free = predict(model, tokenizer, ["c"], max_new_tokens=12)[0]
    assert len(set(free)) > 4
    end = free[4]
    (cut,) = predict(model, tokenizer, ["c"], max_new_tokens=12, end=end)
    assert cut == free[: free.index(end)]


def test_nothing_to_evaluate_on():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with pytest.raises(ValueError, match="no examples to evaluate on"):
        evaluate(model, tokenizer, [], [])
    for examples in ([], [TokenizedExample([5], [])]):
        with pytest.raises(ValueError, match=f"none of {len(examples)} examples has a token to predict"):
            held_out_loss(model, examples, 0)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_that_hold_nothing_are_refused(batch_size):
    tokenizer, model = tiny.tokenizer(), tiny.model()
    examples = tokenize(tokenizer, [Example("ab", "c")])
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        predict(model, tokenizer, ["ab"], max_new_tokens=1, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        held_out_loss(model, examples, 0, batch_size=batch_size)

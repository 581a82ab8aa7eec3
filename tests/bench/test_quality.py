"""The quality suite: a tiny random model through every method, records that a run goes on from, and the page."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time

import pytest
import torch

from bench.quality import cells, goals, intervals, known, page, plan, records, sources, starts, sustained, tables
from bench.quality.__main__ import missing, parser, resolved
from bench.quality.methods import METHODS
from bench.quality.records import Cell, Record
from bench.quality.tasks import TASKS, Task, of_dates
from bench.quality.texts import shown
from prefixcore.cli.train_options import LEARNING_RATES
from prefixcore.training import Example, held_out_loss, predict, tokenize
from tests import tiny

PAIRS = [Example(f"{a}{b} ->", f" {b}{a}\n", f"{a}{b}") for a in "abcde" for b in "vwxyz"]
TASK = Task("dates", "letters", "Swap.\n", PAIRS[:15], PAIRS[15:20], PAIRS[20:])
BUDGET = cells.Budget(steps=2, batch_size=4)
TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
SETTING = {"model": "a", "dtype": "float32", "threads": "1"}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_leaves_the_model_alone(name, model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = METHODS[name]
    task = dataclasses.replace(TASK, labels=("va", "wb"))
    rate = method.rates[0] if method.rates else 0.0
    record = cells.run(Cell("dates", name, 0, rate), method, task, model, tiny.tokenizer(), BUDGET)
    assert len(record.right) == 5
    assert set(record.right) <= {"0", "1"}
    assert (record.numbers > 0) == (method.attach is not None)
    assert record.loss > 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["bare", "prefix", "peft-prompt", "lora"])
def test_an_answer_is_right_where_generation_gives_it(name, model):
    tokenizer, method = tiny.tokenizer(), METHODS[name]
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(method.attach(model, tokenizer, TASK, 0)).model if method.attach else model
        said = predict(asked, tokenizer, [each.prompt for each in PAIRS], max_new_tokens=2)
        # Every second answer is what the model says, the others are not.
        pairs = enumerate(zip(PAIRS, said, strict=True))
        made = [dataclasses.replace(each, completion=s if i % 2 else "~" + s[1:]) for i, (each, s) in pairs if s]
        expected = "".join("01"[s == each.completion] for s, each in zip((s for s in said if s), made, strict=True))
        _, loss, right = cells.answers(asked, tokenizer, made, end="")
        assert "1" in right
        assert right == expected
        if name == "bare":
            assert loss == pytest.approx(held_out_loss(model, tokenize(tokenizer, made, end=""), 0), abs=1e-4)


def test_a_written_prompt_acts_as_its_text_before_the_question(model):
    tokenizer = tiny.tokenizer()
    text = shown(TASK)
    asked = [dataclasses.replace(each, prompt=text + each.prompt) for each in TASK.test]
    _, expected, _ = cells.answers(model, tokenizer, asked)
    _, found, _ = cells.with_text(model, tokenizer, TASK.test, text)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_learning_rate_that_makes_the_loss_no_number_is_recorded_as_that(model):
    cell = Cell("dates", "prompt", 0, 1e38)
    record = cells.run(cell, METHODS["prompt"], TASK, model, tiny.tokenizer(), cells.Budget(steps=4, batch_size=4))
    assert record.right == "00000"
    assert "the loss became" in record.text


@pytest.mark.parametrize("name", ["prompt", "lora"])
def test_a_budget_of_seconds_ends_a_training_by_its_clock(name, model, monkeypatch):
    clock = itertools.count()  # a second goes by whenever somebody looks
    monkeypatch.setattr(cells.time, "process_time", lambda: float(next(clock)))
    cell = Cell("dates", name, 0, 1e-3)
    done = []
    for seconds in (4, 9):
        budget = cells.Budget(batch_size=4, seconds=seconds)
        found = cells.run(cell, METHODS[name], TASK, model, tiny.tokenizer(), budget)
        done.append(found.steps)
        assert found.setting["seconds"] == f"{seconds:.1f}"
        assert found.cpu_seconds_a_step > 0
    assert done == [3, 8]  # one look before it is attached, one at the first step's beginning, one after each step


def test_a_training_that_its_seconds_end_leaves_the_average_of_its_steps(model, monkeypatch):
    found = {}
    for budget in (cells.Budget(steps=5, batch_size=4), cells.Budget(batch_size=4, seconds=5)):
        if budget.seconds is not None:
            clock = itertools.count()
            monkeypatch.setattr(cells.time, "process_time", lambda clock=clock: float(next(clock)))
        with METHODS["prefix"].attach(model, tiny.tokenizer(), TASK, 0) as attached:
            cell = Cell("dates", "prefix", 0, 1e-3)
            steps, _ = cells.train(attached, METHODS["prefix"], cell, TASK, tiny.tokenizer(), budget)
            found[budget.seconds] = steps, [each.detach().clone() for each in attached.parameters]
    (steps, expected), (same, values) = found.values()
    assert steps == same == 5
    assert all(map(torch.equal, values, expected))


def test_the_yardstick_is_the_time_of_a_methods_own_steps_and_start(model):
    began = time.process_time()
    seconds = cells.seconds_of(METHODS["prefix"], TASK, model, tiny.tokenizer(), BUDGET)
    assert 0 < seconds <= time.process_time() - began


def test_a_budget_of_seconds_has_records_and_methods_of_its_own(tmp_path, monkeypatch):
    options = resolved(parser().parse_args(["run", "--seconds", "4"]))
    assert options.out == records.folder_of(4) != records.FOLDER
    assert options.methods == list(plan.TIMED)
    rate = METHODS["prefix"].rates[0]
    asked = ["dates"], ["prefix"], tmp_path / "x4"
    for each in plan.missing(*asked, num_seeds=1):
        records.write(record("prefix", 0, each.rate, 0.5, "0111"), tmp_path / "x4")
    assert not list(plan.missing(*asked, num_seeds=1))
    assert list(plan.missing(*asked)) == [Cell("dates", "prefix", seed, rate) for seed in (1, 2)]
    options = resolved(parser().parse_args(["list", "--parts", "dates", "--methods", "lora", "--first-rate"]))
    options.out = tmp_path / "x4"
    assert list(missing(options)) == [Cell("dates", "lora", 0, METHODS["lora"].rates[0])]
    for tried, validation in zip(METHODS["lora"].rates, (0.5, 0.75), strict=True):
        records.write(record("lora", 0, tried, validation, "0111"), tmp_path / "steps")
    options.first_rate = False
    monkeypatch.setattr(records, "FOLDER", tmp_path / "steps")
    assert list(missing(options)) == [Cell("dates", "lora", 0, rate) for rate in METHODS["lora"].rates]
    options.seconds = 4  # takes the rate that was chosen at equal steps
    assert list(missing(options)) == [Cell("dates", "lora", 0, METHODS["lora"].rates[1])]
    monkeypatch.setattr(records, "TIMED", tmp_path)
    assert "| prefix | 75 (25..100), loss 1.00, 80 steps |" in tables.equal_seconds()
    assert "4 times as many seconds" in tables.equal_seconds()


def test_a_table_of_several_seeds_has_means_of_losses_and_steps_too(tmp_path, monkeypatch):
    for seed, (right, loss, steps) in enumerate([("0111", 1.0, 80), ("0011", 1.5, 61), ("0001", 2.3, 60)]):
        found = dataclasses.replace(record("prefix", seed, 0.002, 0.5, right), loss=loss, steps=steps)
        records.write(found, tmp_path / "x1")
    monkeypatch.setattr(records, "TIMED", tmp_path)
    assert re.search(r"\| prefix \| 50 \([^)]*\), loss 1\.60, 67 steps \|", tables.equal_seconds())
    lever = record("prefix@mlp", 0, 0.002, 0.5, "0111")
    assert re.search(r"\| 50 \([^)]*\), loss 1\.60 \|", tables.levers([*records.read(tmp_path / "x1"), lever]))


def record(method: str, seed: int, rate: float, validation: float, right: str, task: str = "dates") -> Record:
    return Record(task, method, seed, rate, 80, 8, 100, 20, validation, 1.0, right, 1.0, 0.5, "", SETTING)


def test_a_run_goes_on_where_it_stopped_and_further_seeds_take_the_rate_that_was_chosen(tmp_path):
    first = list(plan.missing(["dates"], ["prefix", "bare"], tmp_path))
    assert first == [Cell("dates", "bare"), *(Cell("dates", "prefix", 0, rate) for rate in METHODS["prefix"].rates)]
    low, high = METHODS["prefix"].rates
    records.write(record("prefix", 0, low, 0.5, "0101"), tmp_path)
    assert Cell("dates", "prefix", 0, low) not in plan.missing(["dates"], ["prefix"], tmp_path)
    records.write(record("prefix", 0, high, 0.75, "0111"), tmp_path)
    further = [Cell("dates", "prefix", seed, rate) for seed in (1, 2) for rate in (high, low)]  # low: `train`'s default
    assert list(plan.missing(["dates"], ["prefix"], tmp_path)) == further
    for method in plan.NO_OPTION:
        assert METHODS[method].rates[0] == LEARNING_RATES[method]
    for seed, rate in enumerate(METHODS["lora"].rates):
        records.write(record("lora", 0, rate, 0.5 + seed, "0101"), tmp_path)
    chosen = METHODS["lora"].rates[-1]
    assert list(plan.missing(["dates"], ["lora"], tmp_path)) == [Cell("dates", "lora", s, chosen) for s in (1, 2)]
    records.write(record("bare", 0, 0.0, 0.0, "0000"), tmp_path)
    assert not list(plan.missing(["dates"], ["bare"], tmp_path))


def test_what_counts_are_the_seeds_of_the_rate_that_validation_chose(tmp_path):
    kept = [
        record("prefix", 0, 1e-3, 0.5, "1111"),
        record("prefix", 0, 2e-3, 0.6, "0001"),
        record("prefix", 1, 2e-3, 0.6, "0011"),
    ]
    for each in kept:
        records.write(each, tmp_path)
    assert records.read(tmp_path) == kept
    assert [each.right for each in records.chosen(kept, "dates", "prefix")] == ["0001", "0011"]
    assert records.chosen(kept, "dates", "lora") == []


def test_intervals_hold_the_mean_and_narrow_with_examples():
    few, many = ("01" * 10,), ("01" * 200,)
    for rows in (few, many):
        low, high = intervals.interval(rows)
        assert low < 0.5 < high
    narrow, wide = (high - low for low, high in (intervals.interval(many), intervals.interval(few)))
    assert narrow < wide / 3
    assert intervals.interval(("0" * 30,)) == (0.0, 0.1)
    assert intervals.percent(("1" * 30, "1" * 30)) == "100 (90..100)"


def test_the_page_says_first_where_others_win():
    kept = [record("prefix", 0, 1e-3, 0.5, "0011"), record("lora", 0, 1e-3, 0.5, "0111")]
    assert tables.where_others_win(kept) == "- Dates rewritten: LoRA, rank 8 (PEFT) 75 %, ours at best prefix 50 %."
    assert "| Dates rewritten | 50 prefix | - | - | **75** | - | - |" in tables.summary(kept)
    nowhere = "Nowhere among what has been run; of PEFT's prompts that is 0 of 6 settings."
    assert tables.where_others_win(kept[:1]) == nowhere


def test_goals_say_what_was_met_and_what_was_missed():
    kept = [
        record("prompt", 0, 5e-3, 0.5, "1111", task="capitals"),
        record("prompt", 0, 2e-2, 0.9, "0000", task="capitals"),  # chosen by validation, but nobody asked for this rate
        record("prompt", 1, 5e-3, 0.5, "0111", task="capitals"),
        record("lora", 0, 1e-3, 0.5, "0111", task="capitals"),
        record("peft-prompt", 0, 1e-3, 0.5, "1111", task="capitals"),
    ]
    assert goals.capitals(kept)[:2] == ("soft prompt 88 % (seeds 100, 75)", True)
    assert goals.ahead_of_peft(kept) == ("ahead on none; not on capitals", True, ["capitals"])
    assert goals.beside_lora(kept)[:2] == ("", None)  # as many numbers as LoRA
    kept = [dataclasses.replace(kept[0], numbers=10), *kept[3:]]
    assert goals.beside_lora(kept)[:2] == ("+25 points on average over 1 tasks", True)
    assert goals.table(kept).count("met so far") == 2  # one task of seven
    assert "| not run | - |" in goals.table([])


def test_the_page_and_its_pictures_say_what_the_records_say():
    assert page.render(check=True) == 0


def test_no_task_has_an_example_on_two_sides():
    for task in (TASKS["capitals"](), TASKS["currencies"](), TASKS["continents"](), of_dates()):
        sides = [{each.prompt for each in side} for side in (task.training, task.validation, task.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert min(map(len, sides)) >= 24


def test_tasks_of_countries_are_judged_by_the_same_countries_as_the_demo():
    from bench.demo import task as demo

    expected = {each.source for each in demo.make(demo.countries()).held_out}
    assert {each.source for each in TASKS["capitals"]().test} == expected
    assert {each.source for each in TASKS["continents"]().test} == expected


def test_a_date_is_rewritten():
    text, iso = sources.dates(1, seed=0)[0]
    year = text.split(", ")[1]
    assert iso.startswith(f"{year}-")
    assert len(iso) == 10


def test_capitals_are_counted_window_by_window():
    assert sustained.windows([["AB c", "DE"], ["d", "f1"]]) == [0.5, 0.6667]


def test_starts_are_measured_untrained_and_the_best_draw_is_the_one_of_least_loss(model):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = dict(starts.starts(TASK, model, tokenizer))
    assert len(found) == len(starts.SIZES) * 4 + starts.WRITTEN + 3  # no labels
    written = {found[name].init_text for name in found if "the model writes" in name}
    assert len(written) > 1
    assert all(text.endswith("\n") and "".join(e.prompt + e.completion for e in PAIRS[:2]) in text for text in written)
    names = ("examples, 32 tokens, draw 0", "vocabulary")
    rows = [starts.measure(model, tokenizer, TASK, found[name]) for name in names]
    assert all(set(row) == {"chosen_by", "share", "loss"} for row in rows)
    assert rows[0]["loss"] != rows[1]["loss"]
    assert starts.best_draw(rows)["chosen_by"] == min(row["chosen_by"] for row in rows)


@pytest.mark.parametrize("way", known.WAYS)
def test_what_the_model_says_somewhere_is_known(way, model):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    ask, tokens = known.WAYS[way]
    asked = ask(tokenizer, "ab")
    assert "What is the capital of ab?" in asked
    said = predict(model, tokenizer, [asked], max_new_tokens=tokens)[0]
    examples = [Example("ab ->", f" {answer}\n", "ab") for answer in (said[1:3], "never said")]
    assert known.known(model, tokenizer, examples, way) == "10"


def test_what_must_not_be_handed_on_is_in_no_record(model):
    task = dataclasses.replace(TASK, may_be_quoted=False)
    assert cells.run(Cell("dates", "written-2"), METHODS["written-2"], task, model, tiny.tokenizer()).text == ""
    assert cells.run(Cell("dates", "written-2"), METHODS["written-2"], TASK, model, tiny.tokenizer()).text

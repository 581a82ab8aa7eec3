"""The demo's task: real countries, split without overlap."""

from __future__ import annotations

from bench.demo import prompts, task


def test_the_split_is_the_one_that_the_readme_speaks_of():
    capitals = task.countries()
    assert len(capitals) == 181
    assert capitals["Portugal"] == "Lisbon"
    split = task.make(capitals)
    assert (len(split.training), len(split.held_out)) == (136, 45)


def test_no_country_is_on_both_sides_and_shown_ones_are_trained_on():
    capitals = task.countries()
    for seed in range(20):
        split = task.make(capitals, seed=seed)
        training, held_out = ({example.source for example in part} for part in (split.training, split.held_out))
        assert not training & held_out
        assert training | held_out == set(capitals)
        assert set(task.SHOWN) <= training


def test_the_seed_decides_the_split():
    capitals = task.countries()
    assert task.make(capitals, seed=1) == task.make(capitals, seed=1)
    assert task.make(capitals, seed=1) != task.make(capitals, seed=2)


def test_an_example_reads_as_the_facts_say():
    split = task.make({"Portugal": "Lisbon", **task.SHOWN}, held_out=1)
    (example,) = split.held_out
    assert (example.prompt, example.completion) == ("Portugal ->", " Lisbon\n")


def test_shown_examples_are_true():
    capitals = task.countries()
    assert all(capitals[country] == capital for country, capital in task.SHOWN.items())


def test_no_written_prompt_names_a_held_out_country():
    held_out = {example.source for seed in range(20) for example in task.make(task.countries(), seed=seed).held_out}
    for text in (*prompts.WRITTEN.values(), prompts.INSTRUCTION, prompts.INSTRUCTION_WITH_EXAMPLES):
        assert not [country for country in held_out if country in text]


def test_text_goes_before_the_prompt_only():
    split = task.make(task.countries())
    changed = prompts.with_text(split.held_out, "Say: ")
    assert changed[0].prompt == "Say: " + split.held_out[0].prompt
    assert changed[0].completion == split.held_out[0].completion

"""The demo of serving and what it measures, on a small server of this process."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import prefixcore
from bench.serving import clients, demo, load, page, peft_batches, tasks
from bench.serving.clients import TOKENS, Request
from prefixcore.serving.client import Client
from tests import tiny
from tests.serving.fake_openai import running


def test_every_task_asks_the_same_countries_and_shows_only_trained_ones() -> None:
    found = tasks.all_tasks()
    assert [task.name for task in found] == ["capitals", "currencies", "continents"]
    prompts = {tuple(example.prompt for example in task.split()[1]) for task in found}
    assert len(prompts) == 1
    assert len(next(iter(prompts))) == 45
    for task in found:
        held_out = {example.prompt for example in task.split()[1]}
        assert not any(prompt in task.text for prompt in held_out)
        assert not any(prompt in load.long_text(task) for prompt in held_out)


def test_the_data_is_what_train_reads(tmp_path: Path) -> None:
    training, _ = tasks.all_tasks()[0].split()
    lines = tasks.write(training, tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(training)
    assert json.loads(lines[0]) == {"prompt": "Afghanistan ->", "completion": " Kabul"}


class Asked:
    """A server that answers each completion with the model's name, and notes what was asked."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.tokens = tokens
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> tuple[str, bytes]:
        if not body.get("stream"):
            return "application/json", json.dumps({"choices": [{"index": 0, "text": f" {body['model']}"}]}).encode()
        events: list[dict[str, Any]] = [{"choices": [{"text": "x"}]}] * self.tokens
        events.append({"choices": [], "usage": {"completion_tokens": self.tokens}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode()


@contextmanager
def serving(asked: Asked) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with asked.lock:
                asked.bodies.append(body)
                asked.at_once += 1
                asked.most_at_once = max(asked.most_at_once, asked.at_once)
            kind, data = asked.answer(body)
            with asked.lock:
                asked.at_once -= 1
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address


def test_a_round_sends_each_request_as_often_and_no_more_at_once_than_there_are_clients() -> None:
    asked = Asked()
    with serving(asked) as url:
        found = clients.drive(url, [Request("one", "a"), Request("two", "b")], clients=3, number=10)
    assert Counter(body["model"] for body in asked.bodies) == {"one": 5, "two": 5}
    assert asked.most_at_once <= 3
    assert len(found.answers) == 10
    assert all(0 < answer.first <= answer.whole <= found.seconds for answer in found.answers)
    assert found.tokens_per_second == pytest.approx(10 * TOKENS / found.seconds)


def test_an_answer_of_another_length_is_no_figure() -> None:
    with serving(Asked(tokens=3)) as url, pytest.raises(RuntimeError, match=f"expected {TOKENS} tokens, got 3"):
        clients.drive(url, [Request("one", "a")], clients=1, number=1)


def test_the_demo_asks_every_task_and_none_at_once() -> None:
    asked = Asked()
    with serving(asked) as url:
        table = demo.ask(Client(url), ["capitals", "currencies"], "base")
    assert len(asked.bodies) == 3 * len(demo.ASKED)
    head, *rows = table.splitlines()
    assert head.split() == ["prompt", 'model="capitals"', 'model="currencies"', "the", "bare", "model"]
    assert rows[0].split() == ["Portugal", "->", "capitals", "currencies", "base"]


def test_peft_answers_in_batches_of_one_adapter(tmp_path: Path) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    for seed, name in enumerate(("one", "two")):
        config = prefixcore.PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=seed)
        with prefixcore.attach(model, config) as handle:
            handle.save(tmp_path / name)
    wrapped = peft_batches.load(model, [tmp_path / "one", tmp_path / "two"])
    requests = [Request(name, "Portugal ->") for name in ("one", "two")]
    found = peft_batches.drive(wrapped, tokenizer, requests, clients=4, number=6)
    assert len(found.answers) == 6
    assert all(0 < answer.first < answer.whole for answer in found.answers)


def test_the_page_says_what_was_measured() -> None:
    results, peft = page.read_all()
    assert page.pages.read(page.PAGE) == page.right(results, peft)
    for measured in filter(None, (results, peft)):
        assert {figure["clients"] for figure in measured["figures"]} == set(load.CLIENTS)
        assert all(len(figure["tokens_per_second"]) == measured["stamp"]["rounds"] for figure in measured["figures"])


def test_the_pictures_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    results, peft = page.read_all()
    drawn = page.draw(results, peft, tmp_path / "load")
    assert [file.name for file in drawn] == ["load-light.svg", "load-dark.svg"]
    for file in drawn:
        kept = page.PICTURE.with_name(file.name).read_text(encoding="utf-8")
        assert "no prompt" in kept
        assert kept.count("<!--") == file.read_text(encoding="utf-8").count("<!--")  # the texts, each named once


def test_peft_alone_is_measured_over_one_adapter_and_over_many(tmp_path: Path) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    names = [f"task-{number}" for number in range(3)]
    for seed, name in enumerate(names):
        config = prefixcore.PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=seed)
        with prefixcore.attach(model, config) as handle:
            handle.save(tmp_path / name)
    wrapped = peft_batches.load(model, [tmp_path / name for name in names])
    ways = load.peft_ways(wrapped, tokenizer, names[:1], names)
    assert list(ways) == ["transformers with PEFT, 1 adapter", "transformers with PEFT, 3 adapters"]
    assert all(len(way(2, 4).answers) == 4 for way in ways.values())
    assert [request.model for request in load.requests_for(names)[:4]] == [*names, names[0]]

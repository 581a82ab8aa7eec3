"""validate-serving against servers that are right, and wrong in the ways that servers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixcore.serving.client import Client
from tests.cli.fixtures import prefixcore
from tests.serving import fake_openai, shelf
from tests.serving.fake_openai import Dropping, Leaky, Mixed, OneForAll, Plain, Rounded, Stack, http_answer, saying

__all__ = ["prefixcore"]

NAMES = ("capitals", "sums")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.folder(folder / "model")
    shelf.write(folder / "adapters" / "capitals", seed=1, tokens=4)
    shelf.write(folder / "adapters" / "sums", seed=2, tokens=7)
    return folder


@pytest.fixture
def validate(world: Path, prefixcore: Any, tmp_path: Path) -> Any:
    """`validate(url, *options)` -> (exit code, the report's JSON, standard output, standard error)."""

    def call(url: str, *options: object) -> Any:
        file = tmp_path / "report.json"
        base = ["validate-serving", "--url", url, "--model", world / "model", "--adapters", world / "adapters"]
        code, out, err = prefixcore(
            *base, "--json", file, "--max-tokens", 6, "--count", 2, "--device", "cpu", "--who", "A. Person", *options
        )
        return code, json.loads(file.read_text()) if file.exists() else None, out, err

    return call


def stack(kind: type[Stack], world: Path, **options: Any) -> Any:
    return fake_openai.serving(kind({name: world / "adapters" / name for name in NAMES}, **options))


def failed(report: Any) -> set[str]:
    return {line["check"] for line in report["lines"] if line["verdict"] == "FAILED"}


@pytest.mark.parametrize("says_ids", [True, False], ids=["with ids", "OpenAI's fields alone"])
def test_a_right_server_passes(world: Path, validate: Any, says_ids: bool) -> None:
    with stack(Stack, world, says_ids=says_ids) as url:
        code, report, out, err = validate(url)
    assert code == 0, out + err
    assert report["verdict"].startswith("VALID")
    checks = {line["check"] for line in report["lines"] if line["verdict"] == "passed"}
    assert checks == {"unknown model", "served", "answers", "stream", "dropped prefix", "bare model", "leak"}
    answers = next(line for line in report["lines"] if line["check"] == "answers")
    assert answers["numbers"]["tokens"] > 0
    assert answers["numbers"]["largest difference of log-probabilities"] < 1e-4
    assert answers["numbers"]["prompts from"] == "generic"
    assert "A. Person" in out
    assert "signed: ____" in out
    assert "VALID" in out
    for name in NAMES:
        assert next(line["numbers"]["digest"] for line in report["lines"] if line["subject"] == name) in out


@pytest.mark.parametrize(
    ("kind", "code", "checks", "words"),
    [
        (OneForAll, 4, {"unknown model", "answers", "stream", "leak"}, "the prefix is not applied"),
        (Plain, 3, {"served"}, "does not exist"),
        (Mixed, 4, {"answers", "stream", "leak"}, "it is the answer of 'sums'"),
        (Leaky, 5, {"leak"}, "answers are wrong"),
        (Dropping, 6, {"dropped prefix"}, "the prefix is not applied"),
        (Rounded, 4, {"answers", "bare model", "leak"}, "log-probabilities differ by up to 0.1"),
    ],
)
def test_a_wrong_server_is_found_out(
    world: Path, validate: Any, kind: type[Stack], code: int, checks: set[str], words: str
) -> None:
    with stack(kind, world) as url:
        found, report, out, err = validate(url)
    assert found == code, out + err
    assert checks <= failed(report), out
    assert report["verdict"].startswith("NOT VALID")
    assert words in out


@pytest.mark.parametrize("kind", [OneForAll, Mixed, Leaky, Dropping])
def test_a_wrong_server_that_says_no_tokens_is_found_out(world: Path, validate: Any, kind: type[Stack]) -> None:
    with stack(kind, world, says_ids=False) as url:
        code, report, out, err = validate(url)
    assert code in (4, 5, 6), out + err
    assert failed(report)


def test_an_adapter_without_an_effect_is_not_called_valid(
    world: Path, validate: Any, tmp_path: Path, prefixcore: Any
) -> None:
    """A bare model would answer the same, so nothing is shown."""
    adapters = tmp_path / "adapters"
    shelf.write(adapters / "nothing", seed=3, tokens=1, strength=0.0)
    with fake_openai.serving(Stack({"nothing": adapters / "nothing"})) as url:
        prompt = tmp_path / "prompts.jsonl"
        prompt.write_text(json.dumps({"prompt": "abc" * 25}) + "\n")
        code, report, out, err = validate(url, "--adapters", adapters, "--prompts", prompt, "--tolerance", 1.0)
    assert code == 8, out + err
    assert report["verdict"].startswith("NOT SHOWN")


def test_prompts_of_its_own_and_a_part_of_the_registry(world: Path, validate: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "ab ->", "adapter": "sums"}, {"prompt": "cd ->", "adapter": "sums"}, {"prompt": "xyz"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with stack(Stack, world) as url:
        code, report, out, err = validate(url, "--prompts", prompts, "--only", "sums")
    assert code == 0, out + err
    answers = [line for line in report["lines"] if line["check"] == "answers"]
    assert [(line["subject"], line["numbers"]["prompts from"]) for line in answers] == [("sums", "given")]
    assert answers[0]["numbers"]["prompts"] == 2
    prompts.write_text('{"text": "x"}\n')
    code, _, _, err = validate("http://127.0.0.1:9", "--prompts", prompts)
    assert code == 2
    assert "line 1" in err


def test_prompts_that_the_training_held_out(tmp_path: Path) -> None:
    from prefixcore.adapters import read_record
    from prefixcore.serving.validate_probes import find_probes

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} ->", "completion": " x"}) + "\n" for n in range(20)))
    import prefixcore as package
    from prefixcore.training import read_jsonl, split
    from tests import tiny

    with package.attach(tiny.model(), package.PrefixTuningConfig(num_virtual_tokens=2)) as handle:
        record = {"data": str(data), "split": {"seed": 3, "fraction": 0.2}, "held_out": {}}
        folder = handle.save(tmp_path / "adapter", record=record)
    assert read_record(folder)["split"]["seed"] == 3
    probes = find_probes(folder, {}, 8)
    assert probes.prompts == [example.prompt for example in split(read_jsonl(data), 0.2, 3)[1]]
    assert probes.source == "held out of data.jsonl"
    data.unlink()
    assert find_probes(folder, {}, 8).source == "generic"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (http_answer("<html>hello</html>"), "expected JSON, got <html>hello</html>"),
        (http_answer('{"ok": true}'), "expected a list of models, got {'ok': True}"),
        (http_answer("[1, 2]"), "expected a list of models"),
        (http_answer("gateway", "502 Bad Gateway"), "gateway (HTTP 502)"),
        (http_answer('{"error": "Unauthorized"}', "401 Unauthorized"), "Unauthorized (HTTP 401)"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no answer of HTTP"),
        (b"", "no answer of HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "the answer broke off"),
    ],
)
def test_what_speaks_nonsense_is_named(validate: Any, raw: bytes, words: str) -> None:
    with saying(raw) as url:
        code, report, _, err = validate(url)
    assert code == 2
    assert report is None
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9", "nothing listens there"),
        ("ftp://x", "expected an address"),
        ("http://", "expected an address"),
        ("http://127.0.0.1:99999", "expected an address"),
        ("http://no-such-host.invalid:80", "there is no machine of the name"),
    ],
)
def test_a_server_that_is_not_there(validate: Any, url: str, words: str) -> None:
    code, _, _, err = validate(url)
    assert code == 2
    assert words in err


def test_a_server_that_dies_meanwhile_is_a_line(world: Path, validate: Any) -> None:
    class Dying(Stack):
        def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
            if len(self.requests) > 4:
                return 500, {"error": {"message": "EngineDeadError", "type": "server_error"}}
            return super().answer(body)

    with stack(Dying, world) as url:
        code, _, out, err = validate(url)
    assert code in (3, 4), out + err
    assert "EngineDeadError (HTTP 500)" in out


def test_arguments_that_cannot_be(validate: Any, tmp_path: Path) -> None:
    for options, words in [
        (("--adapters", tmp_path / "no"), "is not a folder"),
        (("--adapters", tmp_path), "holds no adapter"),
        (("--only", "rivers"), "there are capitals, sums"),
        (("--tolerance", "0"), "--tolerance"),
        (("--json", tmp_path / "no" / "x.json"), "there is no folder"),
    ]:
        code, _, _, err = validate("http://127.0.0.1:9", *options)
        assert code == 2
        assert words in err


def test_the_client(world: Path) -> None:
    fake = Stack({name: world / "adapters" / name for name in NAMES})
    with fake_openai.serving(fake) as url:
        client = Client(f"{url}/v1/")
        assert client.models() == [fake_openai.BASE, *NAMES]
        text = client.generate("capitals", "Peru ->", max_tokens=6)
        ids, _ = fake.reference.continuation("capitals", fake.reference.ids("Peru ->"), 6)
        assert text == fake.reference.text(ids)
        assert "".join(client.stream("capitals", "Peru ->", max_tokens=6)) == text
        assert fake.requests[0]["temperature"] == 0

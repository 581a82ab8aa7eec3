"""Adapters on the Hugging Face Hub: put there, loaded from there, refused. The Hub is one of the tests' own."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_hub_download
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore.__main__ import main
from prefixcore.adapters import AdapterError, Registry, adapter_digest, download, read_adapter, upload
from prefixcore.adapters.hub import HubName, local_folder
from prefixcore.adapters.signing import check_signature
from tests import tiny
from tests.adapters.test_signing import key_pair, sign
from tests.hub import TOKEN, Files, Hub, only, serve

MODEL, PEFT, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "prefixcore_manifest.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub where nothing is, an empty cache, and a user who has logged in."""
    with serve() as server, only(server):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # keeps the address of another
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def saved(model, tmp_path):
    """An adapter's folder."""
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=1)
    with prefixcore.attach(model, config) as handle:
        return handle.save(
            tmp_path / "saved", task="country -> capital", license="CC-BY-4.0", metrics={"exact_match": 0.5},
            split={"sha256": "0" * 64}, training={"steps": 3}, seed=1,
        )  # fmt: skip


def files_of(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


def served_files(hub: Hub) -> set[str]:
    """The names of the files whose contents were asked for."""
    return {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}


@pytest.mark.parametrize("config", [prefixcore.PrefixTuningConfig, prefixcore.PTuningConfig], ids=lambda c: c.method)
def test_pushed_and_loaded(hub, model, config):
    with prefixcore.attach(model, config(num_virtual_tokens=4, init="random")) as handle:
        expected = logits(model)
        commit = handle.push_to_hub("somebody/capitals", task="country -> capital", commit_message="The first one")
    assert str(commit).startswith(f"{hub.url}/somebody/capitals/commit/")
    repository = hub.repositories["somebody/capitals"]
    assert repository.messages[-1] == "The first one"
    assert {MODEL, PEFT, MANIFEST, "README.md"} <= repository.files().keys()
    with prefixcore.load(model, "somebody/capitals", trainable=True) as handle:
        assert torch.equal(logits(model), expected)
        assert handle.num_trainable > 0
        assert handle.source.task == "country -> capital"


def test_a_name_without_a_user_is_the_users_own(hub, saved):
    upload(saved, "capitals")
    assert list(hub.repositories) == ["somebody/capitals"]
    assert (
        'prefixcore.load(model, "somebody/capitals")'
        in hub.repositories["somebody/capitals"].files()["README.md"].decode()
    )


def test_the_page_says_what_the_manifest_says(hub, saved, model):
    upload(saved, "somebody/capitals")
    page = hub.repositories["somebody/capitals"].files()["README.md"].decode()
    front = page.split("---")[1]
    for text in ("library_name: peft", "license: cc-by-4.0", "- prefix-tuning"):
        assert text in front
    for text in ("# capitals", "country -> capital", "4 virtual tokens", "exact_match 0.5", adapter_digest(saved)):
        assert text in page
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=5)) as handle:
        handle.push_to_hub("somebody/capitals", task="another one")
    page = hub.repositories["somebody/capitals"].files()["README.md"].decode()
    assert "another one" in page
    assert adapter_digest(saved) not in page
    hub.repositories["somebody/capitals"].commit({"README.md": b"mine"})
    upload(saved, "somebody/capitals")
    assert hub.repositories["somebody/capitals"].files()["README.md"] == b"mine"


def test_a_license_that_the_hub_does_not_know_and_a_base_model_that_it_may(hub, model):
    before = model.name_or_path
    try:
        model.config._name_or_path = model.name_or_path = "team/base"
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
            handle.push_to_hub("somebody/prompt", license="Ours, and\nnobody else's")
    finally:
        model.config._name_or_path = model.name_or_path = before
    front = hub.repositories["somebody/prompt"].files()["README.md"].decode().split("---")[1]
    said = ("license: other", "license_name: Ours, and nobody else's", "base_model: team/base", "relation: adapter")
    for text in said:
        assert text in front


def test_what_is_said_of_an_adapter_stays_a_text(hub, model):
    """On the page, in the YAML in front of it, and in the lines that a reader copies."""
    base = 'x"); import os; os.system("id") #'
    told = {
        "task": "# <script>\n![x](http://x) `code` a|b",
        "intended_use": "a\\|b\u202e",
        "license": "---\nbase_model: else",
    }
    before = model.name_or_path
    try:
        model.config._name_or_path = model.name_or_path = base
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
            handle.push_to_hub("somebody/prompt", **told)
        for name in ("../base", "./base", "models/base"):
            (Path("models") / "base").mkdir(parents=True, exist_ok=True)
            model.config._name_or_path = model.name_or_path = name
            with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
                handle.push_to_hub(f"somebody/{name.strip('./').replace('/', '-')}")
    finally:
        model.config._name_or_path = model.name_or_path = before
    page = hub.repositories["somebody/prompt"].files()["README.md"].decode()
    assert ModelCard(page).data.to_dict() == {
        "library_name": "peft", "license": "other", "license_name": "--- base_model: else",
        "tags": ["prefixcore", "prompt-tuning"],
    }  # fmt: skip
    assert "\n\\# \\<script> !\\[x\\](http://x) \\`code\\` a\\|b\n" in page
    assert "| intended use | a\\\\\\|b\\\\u202e |" in page
    python, shell = (part.split("```")[0] for part in page.split("```")[1::2])
    (called,) = [node for node in ast.walk(ast.parse(python.removeprefix("python"))) if isinstance(node, ast.Call)][:1]
    assert [argument.value for argument in called.args] == [base]
    assert base in shlex.split(shell)
    for name in ("base", "models-base"):  # folders, and no models of the Hub
        assert "base_model:" not in hub.repositories[f"somebody/{name}"].files()["README.md"].decode()


def test_an_adapter_in_place_of_another(hub, model, saved):
    """None of the former one's files stays: with PEFT's configuration of it the new one would be refused."""
    upload(saved, "somebody/x")
    upload(saved, "somebody/x/other")
    hub.repositories["somebody/x"].commit({"notes.txt": b"somebody's own"})
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=3, layers=[1])  # which PEFT's files cannot hold
    with prefixcore.attach(model, config) as handle:
        handle.push_to_hub("somebody/x")
    files = hub.repositories["somebody/x"].files()
    assert PEFT not in files
    assert {"notes.txt", f"other/{PEFT}"} <= files.keys()
    with prefixcore.load(model, "somebody/x") as handle:
        assert handle.num_virtual_tokens == 3
    checkpoint = tiny.model()
    prefixcore.attach(checkpoint, prefixcore.PrefixTuningConfig(num_virtual_tokens=2))
    checkpoint.save_pretrained("run", push_to_hub=True, repo_id="somebody/x")
    with prefixcore.load(model, "somebody/x") as handle:
        assert handle.num_virtual_tokens == 2
    upload(saved, "somebody/x")
    with prefixcore.load(model, "somebody/x") as handle:
        assert handle.num_virtual_tokens == 4


def test_branches_commits_and_pull_requests(hub, saved, model):
    first = upload(saved, "somebody/capitals").oid
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2)) as handle:
        handle.push_to_hub("somebody/capitals", revision="short")
        asked = handle.push_to_hub("somebody/capitals", create_pr=True)
    assert asked.pr_url == f"{hub.url}/somebody/capitals/discussions/1"
    for revision, tokens in ((None, 4), ("main", 4), (first, 4), ("short", 2)):
        with prefixcore.load(model, "somebody/capitals", revision=revision) as handle:
            assert handle.num_virtual_tokens == tokens
    with prefixcore.load(model, "somebody/capitals@short") as handle:
        assert handle.num_virtual_tokens == 2
    for asked in ({"name": "somebody/capitals", "revision": "refs/pr/1"}, {"name": "somebody/capitals@refs/pr/1"}):
        assert read_adapter(download(**asked)).config.num_virtual_tokens == 2
    with pytest.raises(AdapterError, match="names one revision, and revision='main' another"):
        download("somebody/capitals@short", revision="main")


def test_several_in_one_repository(hub, saved, model, tmp_path):
    upload(saved, "team/adapters/capitals")
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2)) as handle:
        handle.push_to_hub(repo_id="team/adapters/sums", task="sums")
    files = hub.repositories["team/adapters"].files()
    assert {f"capitals/{MODEL}", f"sums/{MODEL}", "sums/README.md"} <= files.keys()
    bank = prefixcore.PromptBank(model)
    for name, tokens in (("capitals", 4), ("sums", 2)):
        assert bank.load(name, f"team/adapters/{name}").num_virtual_tokens == tokens
    bank.detach()
    entry = Registry(tmp_path / "registry").add("team/adapters@main/sums")
    assert (entry.name, entry.task) == ("sums", "sums")
    with pytest.raises(AdapterError, match=r"in \['capitals', 'sums'\]: team/adapters/capitals is one"):
        download("team/adapters")
    with pytest.raises(AdapterError, match=f"no adapter is there: expected {MANIFEST} or {PEFT} in other"):
        download("team/adapters/other")


def test_what_peft_has_pushed(hub, model, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_model = peft.get_peft_model(tiny.model(), config)
    with torch.no_grad():
        peft_model.prompt_encoder["default"].embedding.weight.normal_()
    peft_model.save_pretrained(tmp_path / "peft")
    hub.put(
        "somebody/theirs",
        {**files_of(tmp_path / "peft"), "training_args.bin": b"never asked for", "tokenizer.json": b"{}"},
    )
    with prefixcore.load(model, "somebody/theirs") as handle:
        assert handle.num_virtual_tokens == 3
    assert served_files(hub) == {MODEL, PEFT}


@pytest.mark.parametrize("what", ["a LoRA", "a model", "a pickle"])
def test_what_is_no_adapter_is_not_downloaded(hub, model, what):
    lora = {"peft_type": "LORA", "r": 8}
    pickled = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 32, "task_type": "CAUSAL_LM"}
    files, why = {
        "a LoRA": ({PEFT: json.dumps(lora).encode(), MODEL: b"large"}, "peft_type: expected one of .* got 'LORA'"),
        "a model": ({"config.json": b"{}", "model.safetensors": b"large"}, "no adapter is there"),
        "a pickle": (
            {PEFT: json.dumps(pickled).encode(), "adapter_model.bin": b"a pickle"},
            f"has no {MODEL}; adapter_model.bin is a pickle and never read",
        ),
    }[what]
    hub.put("somebody/other", files)
    with pytest.raises(AdapterError, match=why):
        prefixcore.load(model, "somebody/other")
    assert served_files(hub) <= {PEFT}


def test_a_signed_adapter_is_signed_there_and_here(hub, saved, tmp_path):
    """With every file that was signed and none that was not; huggingface_hub's cache is made of links."""
    (saved / "data").mkdir()
    (saved / "data" / "[1].txt").write_text("signed as well")
    key = key_pair(tmp_path, "key")
    sign(saved, key)
    signed = files_of(saved)
    (saved / "notes.txt").write_text("written later")
    upload(saved, "somebody/signed")
    assert hub.repositories["somebody/signed"].files() == signed  # so without a page
    hub.repositories["somebody/signed"].commit({".gitattributes": b"", "README.md": b"", "large/model.bin": b""})
    folder = download("somebody/signed")
    assert files_of(folder) == signed
    assert check_signature(folder, key).startswith(f"{len(signed) - 1} files signed")
    (folder / MODEL).unlink()
    (folder / MODEL).write_bytes(b"another one")
    with pytest.raises(AdapterError, match=f"{MODEL} is not the file that was signed"):
        check_signature(folder, key)


def test_a_link_is_not_published(hub, saved, tmp_path):
    """But for those of the cache, from where an adapter can be pushed to another repository."""
    upload(saved, "somebody/capitals")
    upload(download("somebody/capitals"), "somebody/again")
    assert hub.repositories["somebody/again"].files()[MODEL] == (saved / MODEL).read_bytes()
    (tmp_path / "secret").write_text("a secret")
    (saved / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="README.md: is a link, and .*secret would be published"):
        upload(saved, "somebody/other")
    assert "somebody/other" not in hub.repositories


def test_without_a_network_the_cache_answers(hub, saved, model, monkeypatch):
    upload(saved, "somebody/capitals")
    commit = hub.repositories["somebody/capitals"].branches["main"]
    download("somebody/capitals")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    for name in ("somebody/capitals", f"somebody/capitals@{commit}"):
        with prefixcore.load(model, name) as handle:
            assert handle.num_virtual_tokens == 4
    with pytest.raises(AdapterError, match="somebody/sums: is no folder here and not in the cache, and the Hub cannot"):
        prefixcore.load(model, "somebody/sums")
    assert len(hub.asked) == asked


def test_a_part_in_the_cache(hub, saved, monkeypatch):
    """Which another library has left there."""
    upload(saved, "somebody/capitals")
    hf_hub_download("somebody/capitals", PEFT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="somebody/capitals: the Hub cannot be reached"):
        download("somebody/capitals")


@pytest.mark.parametrize("what", [lambda folder: download("somebody/x"), lambda folder: upload(folder, "somebody/x")])
def test_a_hub_that_hangs_up(hub, saved, what, monkeypatch):
    monkeypatch.setattr("tests.hub._Handler.parse_request", lambda self: False)
    with pytest.raises(AdapterError, match="somebody/x: the Hub cannot be reached"):
        what(saved)


def test_without_huggingface_hub(saved, tmp_path, monkeypatch):
    """Which reading and writing adapters does not need."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert local_folder(saved) == saved
    for what in (lambda: Registry(tmp_path / "registry").add("nobody/x"), lambda: upload(saved, "somebody/x")):
        with pytest.raises(AdapterError, match=r"huggingface_hub, which is missing .*pip install 'prefixcore\[hf\]'"):
            what()


def test_a_page_that_the_hub_refuses(hub, saved):
    (saved / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(AdapterError, match='the Hub refuses: Invalid metadata in README.md. - "license" must be one'):
        upload(saved, "somebody/capitals")


def test_a_commit_that_is_in_the_cache_is_not_asked_for(hub, saved):
    commit = upload(saved, "somebody/capitals").oid
    download("somebody/capitals", revision=commit)
    asked = len(hub.asked)
    download("somebody/capitals", revision=commit)
    assert len(hub.asked) == asked


def test_who_may_see_it(hub, saved, model, monkeypatch):
    upload(saved, "somebody/mine", private=True)
    assert hub.repositories["somebody/mine"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="somebody/mine: no such repository on the Hub, or a private one: log in"):
        prefixcore.load(model, "somebody/mine")
    with prefixcore.load(model, "somebody/mine", token=TOKEN) as handle:
        assert handle.num_virtual_tokens == 4
    with pytest.raises(AdapterError, match="the Hub refuses"):
        upload(saved, "somebody/mine")
    hub.put("somebody/gated", files_of(saved), gated=True)
    with pytest.raises(AdapterError, match="is gated: ask for access"):
        download("somebody/gated", token=TOKEN)


def test_what_is_not_there(hub, saved, model):
    hub.put("somebody/empty", {})
    for name, why in (
        ("somebody/nothing", "no such repository on the Hub"),
        ("somebody/empty", "no adapter is there"),
        ("somebody/empty@v9", "has no revision 'v9'"),
        ("nothing", "nothing: no such folder"),
    ):
        with pytest.raises(AdapterError, match=why):
            prefixcore.load(model, name)
    for name in ("somebody/two@main", "some body/x", "..", "somebody/..", ""):
        with pytest.raises(AdapterError, match="expected the name of a repository on the Hub"):
            upload(saved, name)
    with pytest.raises(AdapterError, match="revision='v1' is one of an adapter on the Hub, and this is a path"):
        prefixcore.load(model, saved, revision="v1")


def test_a_path_is_not_asked_for(hub, saved, model, tmp_path):
    """What is here comes first, and so does what begins with a folder that is here."""
    shutil.copytree(saved, tmp_path / "somebody" / "capitals")
    with prefixcore.load(model, "somebody/capitals"):
        pass
    for name in ("somebody/capitols", "./nobody/capitals", str(tmp_path / "no" / "where"), "~/capitals"):
        with pytest.raises(AdapterError, match="no such folder"):
            prefixcore.load(model, name)
    hint = "no such folder; as somebody is one here, this is a path: on the Hub it is somebody/all@main/sums"
    with pytest.raises(AdapterError, match=hint):
        prefixcore.load(model, "somebody/all/sums")
    for name in (f"{'x' * 300}/y", f"somebody/{'x' * 300}"):
        with pytest.raises(AdapterError, match="File name too long"):
            prefixcore.load(model, name)
    assert not hub.asked
    hub.put("somebody/capitols", files_of(saved))
    with prefixcore.load(model, "somebody/capitols@main"):  # this is no path
        assert hub.asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/name", ("user/name", None, "")),
        ("user/name@v1.0", ("user/name", "v1.0", "")),
        ("user/name@v1/a/b-c", ("user/name", "v1", "a/b-c")),
        ("user/name/a", ("user/name", None, "a")),
        ("user/name@refs/pr/12/a", ("user/name", "refs/pr/12", "a")),
        ("name", None),
        ("/user/name", None),
        ("../name", None),
        ("user/..", None),
        ("user/name/../../x", None),
        ("user/name/.hidden", None),
        ("user/name@", None),
        ("user/na me", None),
        ("C:\\user\\name", None),
    ],
)
def test_names(text, expected):
    assert HubName.parse(text) == expected
    if expected is None:
        assert local_folder(text) == Path(text)


def test_a_bank(hub, model):
    """Whose folders lie in one of the checkpoint's."""
    trained = tiny.model()
    bank = prefixcore.PromptBank(trained)
    for name in ("capitals", "sums"):
        bank.attach(name, prefixcore.PrefixTuningConfig(num_virtual_tokens=len(name)))
    for push in (lambda: trained.push_to_hub("somebody/run"), lambda: trained.push_to_hub("run", commit_message="Two")):
        assert hub.url in str(push())
    assert hub.repositories["somebody/run"].messages[-1] == "Two"
    assert bank["sums"].push_to_hub("somebody/sums")
    bank.detach()
    assert "push_to_hub" not in vars(trained)
    for name, tokens in (("run/prefixcore/capitals", 8), ("run/prefixcore/sums", 4), ("sums", 4)):
        with prefixcore.load(model, f"somebody/{name}") as handle:
            assert handle.num_virtual_tokens == tokens
    with pytest.raises(AdapterError, match="somebody/run/prefixcore/capitals is one"):
        prefixcore.load(model, "somebody/run")


@pytest.mark.parametrize("how", ["trainer", "model", "save_pretrained"])
def test_a_checkpoint(hub, tmp_path, how):
    """What Trainer, the model's own method and `save_pretrained` push, `load` finds the adapter in."""
    model = tiny.model()
    prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4, init="random"))
    if how == "trainer":
        examples = [{"input_ids": list(range(2, 10)), "labels": list(range(2, 10))}] * 4
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[],
            push_to_hub=True, hub_model_id="somebody/run", use_cpu=True, learning_rate=0.1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.train()
        trainer.push_to_hub()
    elif how == "model":
        model.push_to_hub("somebody/run")
    else:
        model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="somebody/run", commit_message="From here")
        assert hub.repositories["somebody/run"].messages[-1] == "From here"
    assert f"prefixcore/{MANIFEST}" in hub.repositories["somebody/run"].files()
    bare = tiny.model()
    with prefixcore.load(bare, "somebody/run"):
        assert torch.equal(logits(bare), logits(model))


def test_a_lora_beside_virtual_tokens(hub):
    """Both are pushed, each where its own library finds it."""
    peft_model = peft.get_peft_model(tiny.model(), peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    expected = logits(peft_model.get_base_model())
    handle = prefixcore.attach(peft_model.get_base_model(), prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
    both = logits(handle.model)
    peft_model.push_to_hub("somebody/both", commit_message="Both")
    assert hub.repositories["somebody/both"].messages[-1] == "Both"
    loaded = peft.PeftModel.from_pretrained(tiny.model(), "somebody/both").get_base_model()
    assert torch.equal(logits(loaded), expected)
    with prefixcore.load(loaded, "somebody/both"):
        torch.testing.assert_close(logits(loaded), both)
    handle.detach()
    peft_model.push_to_hub("somebody/alone")  # PEFT's own way
    assert not [name for name in hub.repositories["somebody/alone"].files() if "prefixcore" in name]


def test_the_command_line(hub, saved, tmp_path, capsys):
    tiny.folder(tmp_path / "model")
    assert main(["push", str(saved), "somebody/capitals", "--private", "--message", "By hand"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/somebody/capitals/commit/")
    repository = hub.repositories["somebody/capitals"]
    assert (repository.private, repository.messages[-1]) == (True, "By hand")
    assert main(["inspect", "somebody/capitals", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == adapter_digest(saved)
    assert main(["add", "somebody/capitals", "registry"]) == 0
    assert Registry("registry").find("capitals").digest == adapter_digest(saved)
    given = ["--model", str(tmp_path / "model"), "--prompt", "abc", "--max-new-tokens", "3"]
    assert main(["generate", "--adapter", "somebody/capitals", *given]) == 0
    here = capsys.readouterr().out
    assert main(["generate", "--adapter", str(saved), *given]) == 0
    assert here.endswith(capsys.readouterr().out)
    assert main(["verify", "somebody/capitals", "--skip", "data", "--skip", "intended_use"]) == 0
    assert main(["convert", "somebody/capitals", "--to", "peft", "--out", "theirs"]) == 0
    assert read_adapter("theirs").config.num_virtual_tokens == 4
    asked = len(hub.asked)
    for command in (["inspect"], ["add"], ["bake"], ["audit"], ["verify"], ["convert"], ["generate", "--adapter"]):
        more = {
            "add": ["registry"], "bake": ["--model", "model", "--out", "x"], "audit": ["--probe", "x"],
            "convert": ["--to", "peft", "--out", "x"], "generate": ["--prompt", "abc"],
        }.get(command[0], [])  # fmt: skip
        assert main([*command, "./somebody/capitals", *more]) == 2
        assert re.search("no such folder|is not a folder", capsys.readouterr().err)
    assert len(hub.asked) == asked
    assert main(["push", "nowhere", "somebody/capitals"]) == 2
    assert main(["inspect", "somebody/nothing"]) == 2
    assert "no such repository on the Hub" in capsys.readouterr().err


def test_the_settings_of_huggingface_hub_hold(hub, saved, tmp_path):
    """In a process of its own, which reads the environment."""
    upload(saved, "somebody/capitals")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**others, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "prefixcore", "inspect", "somebody/capitals"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout

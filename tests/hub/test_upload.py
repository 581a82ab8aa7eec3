"""Adapters put on the Hub, alone, in place of others, and in the checkpoints of models that hold them."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore.adapters import AdapterError, Registry, download, read_adapter, upload
from tests import tiny
from tests.hub.files import MANIFEST, MODEL, PEFT, logits


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


def test_a_checkpoint_in_a_folder_of_the_repository(hub, saved):
    """The adapter beside it stays as it is."""
    upload(saved, "somebody/runs")
    model = tiny.model()
    prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2))
    model.push_to_hub("somebody/runs/first", max_shard_size="1GB")
    assert f"first/prefixcore/{MANIFEST}" in hub.repositories["somebody/runs"].files()
    for name, tokens in (("somebody/runs", 4), ("somebody/runs/first", 2)):
        with prefixcore.load(tiny.model(), name) as handle:
            assert handle.num_virtual_tokens == tokens


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

"""Which texts are names on the Hub, and which are paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import prefixcore
from prefixcore.adapters import AdapterError
from prefixcore.adapters.hub import HubName, local_folder
from tests.hub.files import files_of


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

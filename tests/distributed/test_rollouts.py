"""Two processes whose answers one server writes: one of them tells it the virtual tokens, and no answer comes twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed import launch


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_two_processes_share_a_group(tmp_path: Path) -> None:
    first, second = launch.run("rollouts", tmp_path)
    assert first["differences"] == second["differences"]
    assert len(first["differences"]) == 3
    assert max(first["differences"]) < 1e-4
    asked = first["asked"]
    assert [n for n, _ in asked] == [2] * 6
    for step in range(0, 6, 2):
        (_, one), (_, other) = asked[step : step + 2]
        assert abs(one - other) >= 2  # of n answers, the i-th has the seed plus i

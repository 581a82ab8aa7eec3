"""Where the time of one step goes, by parts: the bare model, PEFT's prefix ("before") and ours ("after")."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.models import SMALL, TINY
from bench.scale import SCALE, pick
from bench.steps.check import check_step
from bench.steps.contenders import MAKERS, Step
from bench.steps.profile import parts

LONG, SHORT = Step(SMALL[0], 1, 1024, 64, brief=True), Step(SMALL[1], 4, 128, 20, brief=True)
CASES = pick(smoke=[Step(TINY[0], 2, 9, 4)], quick=[LONG], full=[LONG, SHORT])
WAYS = ("bare model", "PEFT prefix", "prefixcore prefix")
STEPS = {"smoke": 1, "quick": 2, "full": 5}[SCALE]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_a_step_goes(note: Callable[..., None], case: Step) -> None:
    error = check_step(case)
    model, batch = case.model(), case.batch()
    note(
        "profile",
        case.case(),
        lambda: None,
        relative_error=error,
        milliseconds={name: parts(MAKERS[name](model, batch, case.P), STEPS) for name in WAYS},
    )

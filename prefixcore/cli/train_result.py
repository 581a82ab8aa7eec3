"""What comes of a training: what is said of it, and the adapter that is saved."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from .. import _interrupt
from .common import INTERRUPTED, OK, columns_of
from .failures import user_errors
from .output import results, say
from .train_examples import HeldOutEvaluator
from .train_provenance import Provenance
from .train_report import Report

if TYPE_CHECKING:
    from ..training import TrainingRecord

CURVE = "curve.png"
AFTER = "after training"
"""The name of the evaluation whose numbers are the adapter's own."""


def conclude(
    arguments: argparse.Namespace,
    handle: Any,
    record: TrainingRecord,
    evaluator: HeldOutEvaluator,
    provenance: Provenance,
    report: Report,
) -> int:
    """Save, evaluate, and save again with what came of it."""
    if record.steps_done == 0:
        say("stopped before the first step; nothing was saved")
        return INTERRUPTED
    say_what_is_kept(record)
    stopped = save(arguments, handle, record, evaluator, provenance) or record.asked_to_stop
    if record.interrupted:
        steps = f"{record.steps_done} of {record.options.steps} steps"
        say(f"stopped after {steps}; saved what there is to {arguments.out}")
        return INTERRUPTED
    if evaluator.held_out and not stopped:
        evaluator(AFTER)
        report.result(record, evaluator.results[AFTER])
        stopped = save(arguments, handle, record, evaluator, provenance)
    if stopped:
        raise KeyboardInterrupt
    say(f"adapter  {arguments.out}\ncurve    {arguments.out / CURVE}")
    if evaluator.held_out:
        results(evaluator.table())
    return OK


def say_what_is_kept(record: TrainingRecord) -> None:
    """Which step's values are saved, where that is not the last of all."""
    options = record.options
    if record.stopped_early:
        say(
            f"stopped early after {record.steps_done} of {options.steps} steps: the last "
            f"{options.early_stopping_patience} held-out losses were not below the least before"
        )
    if options.keep == "best" and not any(math.isfinite(loss) for _, loss in record.held_out_loss):
        say("warning: no held-out loss was a number, so none is the best, and the last step's values are kept")
    elif record.kept_step == 0:
        say("warning: no held-out loss was below that of the start, whose values are kept; --keep last keeps the last")
    elif record.kept_step < record.steps_done:
        say(f"kept the values of step {record.kept_step}, whose held-out loss is the least")


def save(
    arguments: argparse.Namespace,
    handle: Any,
    record: TrainingRecord,
    evaluator: HeldOutEvaluator,
    provenance: Provenance,
) -> bool:
    """Write adapter, record and curve as one; whether Ctrl-C came meanwhile (it is heeded afterwards)."""
    from ..adapters import AdapterError
    from ..training import Curve, draw_curve
    from ..training.stopping import stop_on_signal

    method = handle.config.method
    fields = {**asked_for(arguments), "held_out": evaluator.to_dict(), **record.to_dict()}
    before = _interrupt.written()
    saving = before
    if before == _interrupt.NOTHING:
        saving = f"{arguments.out} is as it was before, or the new adapter, whole"
    with stop_on_signal() as stopping, user_errors(AdapterError):
        curve = draw_curve([Curve(method, record)], title=f"{method}, {arguments.data.name}")
        # A second Ctrl-C ends the save. It raises, so that what is half written is taken away.
        _interrupt.tell(saving, at_once=False)
        try:
            said = provenance.fields(record, evaluator.results.get(AFTER))
            handle.save(arguments.out, record=fields, curve=curve, **said)
        except AdapterError:
            _interrupt.tell(before)
            raise
        except BaseException:
            _interrupt.tell(saving)
            raise
        _interrupt.tell(f"the adapter is in {arguments.out}")
        return stopping()


def asked_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """Model, data and split, as a training record keeps them."""
    from ..training.columns import Columns

    return {
        "model": arguments.model,
        "data": str(arguments.data),
        "end": arguments.end,
        "chat": arguments.chat,
        **Columns(*columns_of(arguments)).settings,
        "split": None if arguments.eval_data else {"seed": arguments.split_seed, "fraction": arguments.eval_fraction},
    }

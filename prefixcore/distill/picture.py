"""The picture of a distillation: the divergence over the steps, and the scores side by side."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from ..training import TrainingRecord
from ..training.curve import plain
from .report import CUT, FULL, NOTHING, PREFIX, START, Report

# Okabe and Ito's palette, which colour-blind readers can tell apart, also in print.
_COLOURS = {FULL: "#000000", PREFIX: "#0072B2", START: "#56B4E9", CUT: "#D55E00", NOTHING: "#999999"}


def draw(record: TrainingRecord, report: Report, *, title: str = "") -> bytes:
    """A PNG: on the left KL(teacher || student) of training and validation prompts, on the right the held-out scores.

    Args:
        record: of the training.
        report: the scores; without any there is the left part alone.
        title: stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2) if report.scores else (5.6, 4.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if report.scores else 1, squeeze=False)[0]
    _losses(axes[0], record)
    if report.scores:
        _scores(axes[1], report)
    if title:
        figure.suptitle(title, fontsize=11)
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _losses(axis: Any, record: TrainingRecord) -> None:
    if record.train_loss:
        axis.plot(*zip(*record.train_loss, strict=True), color="#0072B2", linewidth=0.8, alpha=0.35, label="training")
    if record.held_out_loss:
        axis.plot(
            *zip(*record.held_out_loss, strict=True),
            color="#D55E00",
            linewidth=1.9,
            marker="o",
            markersize=4,
            label="validation",
        )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("KL to the full text (nats per answer token)")
    plain(axis, "y")
    axis.legend(frameon=False, fontsize=9)


def _scores(axis: Any, report: Report) -> None:
    """Groups of bars: one group a measure, one bar for each thing that stands before the prompts."""
    measures = [("right", "accuracy"), ("answers equal", "agreement"), ("tokens equal", "token_agreement")]
    shown = [
        (title, name)
        for title, name in measures
        if any(getattr(score, name) is not None for score in report.scores.values())
    ]
    width = 0.8 / len(report.scores)
    for place, (name, score) in enumerate(report.scores.items()):
        values = [getattr(score, measure) or 0.0 for _, measure in shown]
        offsets = [group + (place - (len(report.scores) - 1) / 2) * width for group in range(len(shown))]
        label = f"{name} ({score.tokens:,} tokens)"
        bars = axis.bar(offsets, values, width * 0.92, color=_COLOURS.get(name), label=label)
        axis.bar_label(bars, [f"{value:.2f}".lstrip("0") or "0" for value in values], fontsize=7, padding=1)
    axis.set_xticks(range(len(shown)), [title for title, _ in shown])
    axis.set_ylim(0, 1.08)
    axis.set_ylabel(f"share, on {report.prompts['held_out']} held-out prompts")
    plain(axis, "y")
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)

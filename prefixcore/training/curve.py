"""The picture of a training run: training and held-out loss over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from .options import TrainingRecord

# Okabe and Ito's palette, which colour-blind readers can tell apart, also in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Curve:
    """One line of the picture: a name and the losses by step, in nats per completion token.

    Examples:
        >>> from prefixcore.training import Curve, TrainingOptions, TrainingRecord
        >>> record = TrainingRecord(TrainingOptions(), train_loss=[(1, 2.0), (2, 1.5)])
        >>> Curve("prefix", record).name
        'prefix'
    """

    name: str
    record: TrainingRecord


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _mark_kept(axis: Any, record: TrainingRecord, colour: str) -> None:
    """A ring around the held-out loss of the values that were kept, where the best were."""
    if record.options.keep != "best" or record.interrupted:
        return
    loss = dict(record.held_out_loss)[record.kept_step]
    axis.plot(record.kept_step, loss, "o", markersize=11, markerfacecolor="none", color=colour, markeredgewidth=1.6)
    axis.annotate(
        f"kept: {loss:.3f}", (record.kept_step, loss), (0, 10), textcoords="offset points", ha="center", fontsize=9
    )


def write_curve(path: str | Path, curves: Sequence[Curve], *, title: str = "") -> Path:
    """Write the picture of `draw_curve` to a file, whole or not at all.

    Examples:
        >>> from prefixcore.training import Curve, TrainingOptions, TrainingRecord, write_curve
        >>> record = TrainingRecord(TrainingOptions(), train_loss=[(1, 2.0), (2, 1.5)])
        >>> write_curve("curve.png", [Curve("prefix", record)]).exists()
        True
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.writing")
    try:
        unfinished.write_bytes(draw_curve(curves, title=title))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def draw_curve(curves: Sequence[Curve], *, title: str = "") -> bytes:
    """The losses over the steps as a PNG.

    On the left the training loss of each step (faint) and its moving average; on the right the held-out loss, where
    there is any, with a ring around that of the values that `keep="best"` has kept. Losses that differ tenfold get a
    logarithmic axis.

    Examples:
        >>> from prefixcore.training import Curve, TrainingOptions, TrainingRecord, draw_curve
        >>> record = TrainingRecord(TrainingOptions(), train_loss=[(1, 2.0), (2, 1.5)])
        >>> draw_curve([Curve("prefix", record)])[1:4]
        b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    has_held_out = any(curve.record.held_out_loss for curve in curves)
    figure = Figure(figsize=(9.6, 4.0) if has_held_out else (5.6, 4.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if has_held_out else 1, sharey=True, squeeze=False)[0]
    for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
        steps = [step for step, _ in curve.record.train_loss]
        losses = [loss for _, loss in curve.record.train_loss]
        axes[0].plot(steps, losses, color=colour, linewidth=0.7, alpha=0.3)
        axes[0].plot(steps, _smooth(losses), color=colour, linewidth=1.9, label=curve.name)
        if has_held_out and curve.record.held_out_loss:
            axes[1].plot(
                *zip(*curve.record.held_out_loss, strict=True),
                color=colour,
                linewidth=1.9,
                marker="o",
                markersize=4,
                label=curve.name,
            )
            _mark_kept(axes[1], curve.record, colour)
    losses_above_zero = [
        loss for curve in curves for _, loss in (*curve.record.train_loss, *curve.record.held_out_loss) if loss > 0
    ]
    logarithmic = bool(losses_above_zero) and max(losses_above_zero) > 10 * min(losses_above_zero)
    for axis, name in zip(axes, ("training", "held out, never trained on"), strict=False):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimizer step")
        plain(axis)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
    axes[0].set_ylabel("loss (nats per completion token)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    picture = BytesIO()
    figure.savefig(picture)
    return picture.getvalue()


def plain(axis: Any, lines: Literal["x", "y", "both"] = "both") -> None:
    """Gives an axis thin grey lines behind what is drawn, and no frame at the top and on the right."""
    axis.grid(True, axis=lines, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)

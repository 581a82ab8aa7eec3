"""The picture of a tuning: held-out losses over the steps, and over learning rates and lengths."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

from ..curve import plain
from .result import Trial, Tuning

_COLOURS = "viridis"
"""Of learning rates, from dark to light: in order also for colour-blind readers, and in print."""


def draw_tuning(tuning: Tuning, *, title: str = "") -> bytes:
    """A PNG: on the left the held-out loss of each candidate, on the right the least by learning rate, a line a length.

    The colour is the learning rate; the line of the best candidate is thick, with a ring around its best values.

    Examples:
        >>> from prefixcore.training.tuning import Candidate, Trial, Tuning, draw_tuning
        >>> config = prefixcore.PrefixTuningConfig(num_virtual_tokens=4)
        >>> trials = [Trial(Candidate(rate, config), str(rate), [(0, 3.0), (5, 3 - rate)]) for rate in (0.5, 1.0)]
        >>> draw_tuning(Tuning(trials, [], 1.0, {}))[1:4]
        b'PNG'
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rates = sorted({trial.candidate.learning_rate for trial in tuning.trials})
    norm = LogNorm(rates[0] / 1.001, rates[-1] * 1.001)
    palette = colormaps[_COLOURS].resampled(256)

    def colour(trial: Trial) -> Any:
        return palette(0.9 * norm(trial.candidate.learning_rate))

    for trial in reversed(tuning.trials):  # the best is drawn last, above the others
        points = [(step, loss) for step, loss in trial.held_out_loss if math.isfinite(loss)]
        if points:
            is_best = trial is tuning.best
            left.plot(*zip(*points, strict=True), color=colour(trial), linewidth=2.4 if is_best else 1.0)
            left.plot(*points[-1], "o", color=colour(trial), markersize=5 if is_best else 3)
    step, loss = tuning.best.best
    left.plot(step, loss, "o", markersize=11, markerfacecolor="none", color="black", markeredgewidth=1.4)
    left.annotate(f"{loss:.3f}", (step, loss), (0, 10), textcoords="offset points", ha="center", fontsize=9)
    left.set_title("each candidate, while it is in", fontsize=10)
    left.set_xlabel("optimizer step")
    left.set_ylabel("held-out loss (nats per completion token)")

    for number, length in enumerate(sorted({trial.candidate.num_virtual_tokens for trial in tuning.trials})):
        row = sorted(
            (trial for trial in tuning.trials if trial.candidate.num_virtual_tokens == length),
            key=lambda trial: trial.candidate.learning_rate,
        )
        least = [(t.candidate.learning_rate, t.best[1]) for t in row if math.isfinite(t.best[1])]
        if least:
            style = ("-", "--", "-.", ":")[number % 4]
            right.plot(*zip(*least, strict=True), style, color="#555555", linewidth=1.2, label=f"P {length}")
        for trial in row:
            if math.isfinite(trial.best[1]):
                size = 30 + 30 * trial.rung
                right.scatter([trial.candidate.learning_rate], [trial.best[1]], s=size, color=colour(trial), zorder=3)
    right.set_xscale("log")
    right.set_title("the least of each (larger: longer in)", fontsize=10)
    right.set_xlabel("learning rate")
    for axis in (left, right):
        plain(axis)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

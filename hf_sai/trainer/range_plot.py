"""The picture of a learning-rate range test: loss over learning rate, and the suggestion. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_sai.publishing.plots import BACKGROUND, COLORS, GRID, TEXT, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_sai.trainer.range_test import RangeTest

__all__ = ["plot_range_test"]


def plot_range_test(test: RangeTest) -> Figure:
    """Loss of each step (thin) and smoothed (thick) over the learning rate, which is logarithmic.

    Args:
        test: What :func:`hf_sai.trainer.range_test.range_test` returned.

    Returns:
        A matplotlib figure; losses far above the start are cut off.
    """
    figure = new_figure(width=8)
    axes = figure.subplots()
    axes.plot(test.learning_rates, test.losses, color=COLORS[0], linewidth=0.8, alpha=0.5, label="loss")
    axes.plot(test.learning_rates, test.smoothed, color=COLORS[0], linewidth=2, label="smoothed")
    if test.suggestion is not None:
        label = f"suggestion: {test.suggestion:.2g}"
        axes.axvline(test.suggestion, color=COLORS[1], linestyle="--", linewidth=1.5, label=label)
    known = [loss for loss in (*test.losses, *test.smoothed) if math.isfinite(loss)]
    low, high = min(known, default=0.0), min(max(known, default=1.0), 1.5 * test.start)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xscale("log")
    dress(axes, "learning rate", "training loss")
    axes.legend(facecolor=BACKGROUND, edgecolor=GRID, labelcolor=TEXT)
    return figure

"""The picture of a learning-rate range test: loss over learning rate, and the suggestion. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_sai.publishing.plots import THEMES, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_sai.trainer.range_test import RangeTest

__all__ = ["plot_range_test"]


def plot_range_test(test: RangeTest, theme: str = "light") -> Figure:
    """Loss of each step (thin) and smoothed (thick) over the learning rate, which is logarithmic.

    Args:
        test: What :func:`hf_sai.trainer.range_test.range_test` returned.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure; losses far above the start are cut off.
    """
    look = THEMES[theme]
    figure = new_figure(theme, width=8)
    axes = figure.subplots()
    axes.plot(test.learning_rates, test.losses, color=look.colors[0], linewidth=0.8, alpha=0.5, label="loss")
    axes.plot(test.learning_rates, test.smoothed, color=look.colors[0], linewidth=2, label="smoothed")
    if test.suggestion is not None:
        label = f"suggestion: {test.suggestion:.2g}"
        axes.axvline(test.suggestion, color=look.colors[1], linestyle="--", linewidth=1.5, label=label)
    known = [loss for loss in (*test.losses, *test.smoothed) if math.isfinite(loss)]
    low, high = min(known, default=0.0), min(max(known, default=1.0), 1.5 * test.start)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xscale("log")
    dress(axes, theme, "learning rate", "training loss")
    axes.legend(facecolor=look.background, edgecolor=look.grid, labelcolor=look.text)
    return figure

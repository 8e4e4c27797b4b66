"""Draws held-out pictures with what a model takes them for."""

from __future__ import annotations

from pathlib import Path

import torch
from picture_views import Collator, PictureViews
from transformers import PreTrainedModel

from hf_sai.publishing.plots import COLORS, TEXT, draw, new_figure
from hf_sai.runs.files import atomic_write

__all__ = ["draw_predictions"]

ROWS, COLUMNS = 4, 10
LONGEST_LABEL = 12


@torch.no_grad()
def draw_predictions(model: PreTrainedModel, views: PictureViews, collate: Collator, path: Path) -> Path:
    """Draw pictures from all over a data set, each with its predicted class; of a wrong one also the right class.

    Args:
        model: Has `id2label`.
        views: Pictures; 40 of them are shown.
        collate: Makes the model's input of them.
        path: PNG file to write.

    Returns:
        The path.
    """
    count = min(ROWS * COLUMNS, len(views))
    chosen = [index * len(views) // count for index in range(count)]
    batch = collate([views[index] for index in chosen])
    guesses = model.eval()(pixel_values=batch["pixel_values"].to(model.device, model.dtype)).logits.argmax(-1).tolist()
    figure = new_figure(width=COLUMNS, height=1.3 * ROWS)
    for place, (index, guess) in enumerate(zip(chosen, guesses, strict=True), start=1):
        axes = figure.add_subplot(ROWS, COLUMNS, place)
        axes.set_axis_off()
        pixels = batch["pixel_values"][place - 1].permute(1, 2, 0)
        low, high = pixels.min(), pixels.max()
        axes.imshow(((pixels - low) / (high - low).clamp(min=1e-6)).numpy(), interpolation="nearest")
        guessed, right = (_short(model.config.id2label[label]) for label in (guess, views.labels[index]))
        wrong = guess != views.labels[index]
        title = f"{guessed}, not {right}" if wrong else guessed
        axes.set_title(title, fontsize=8, color=COLORS[1] if wrong else TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, draw(figure))


def _short(label: str) -> str:
    label = str(label).replace("$", r"\$")  # matplotlib reads what stands between dollars as a formula
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"

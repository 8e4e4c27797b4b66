"""What the model sees of a picture: random crops and mirror images in training, the whole picture in evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from labelled_images import read_picture
from PIL import Image as Picture
from torch import Tensor
from torch.utils import data

__all__ = ["Collator", "PictureViews", "random_view", "side_length"]

LONGEST_TO_SHORTEST = 4 / 3  # of a random crop's sides


class PictureViews(data.Dataset):
    """Pictures with their labels, in views.

    Args:
        rows: Data set with a column of images and one of classes.
        args: `image_column`, `label_column`, `crop_scale` and `flip` are read.
        side: Side of the square that a random view is, in pixels; None: the whole picture as it is. Random views draw
            from torch's random number generator.
    """

    def __init__(self, rows: Dataset, args: Any, *, side: int | None) -> None:
        self.rows, self.args, self.side = rows, args, side
        labels = rows.select_columns([args.label_column]).with_format("numpy")[:]  # at once, however many they are
        self.labels: list[int] = labels[args.label_column].tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Picture.Image, int]:
        picture = read_picture(self.rows, self.args.image_column, index)
        if self.side is not None:
            picture = random_view(picture, self.side, self.args.crop_scale, self.args.flip)
        return picture, self.labels[index]


class Collator:
    """Makes a batch: `pixel_values` of shape (batch, 3, side, side) and `labels`.

    Args:
        processor: The model's image processor, which brings pictures to the model's size and range.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, views: Sequence[tuple[Picture.Image, int]]) -> dict[str, Tensor]:
        pictures, labels = zip(*views, strict=True)
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}


def side_length(processor: Any) -> int:
    """Return the side of the square pictures that a processor makes, in pixels."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else processor.size
    return int(size.get("height") or size["shortest_edge"])


def random_view(picture: Picture.Image, side: int, scale: float, flip: bool) -> Picture.Image:
    """Return a random crop, brought to a square, and in half of all cases its mirror image.

    Args:
        picture: Any size.
        side: Of the square, in pixels.
        scale: The crop covers between this part of the picture's area and all of it (0 < scale <= 1); 1: no crop.
        flip: Whether views may be mirrored.
    """
    box = _random_box(*picture.size, scale) if scale < 1 else None
    view = picture.resize((side, side), Picture.Resampling.BICUBIC, box=box)
    return view.transpose(Picture.Transpose.FLIP_LEFT_RIGHT) if flip and torch.rand(()).item() < 0.5 else view


def _random_box(width: int, height: int, scale: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random crop, about as wide as high."""
    area = width * height * (scale + (1 - scale) * torch.rand(()).item())
    log_aspect = (2 * torch.rand(()).item() - 1) * math.log(LONGEST_TO_SHORTEST)
    crop_width = min(width, math.sqrt(area * math.exp(log_aspect)))
    crop_height = min(height, area / crop_width)
    left, top = torch.rand(()).item() * (width - crop_width), torch.rand(()).item() * (height - crop_height)
    return left, top, left + crop_width, top + crop_height

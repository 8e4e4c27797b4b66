"""Figures for pictures of emoji, instead of CLIP score and FID, whose networks cannot be had offline.

A small classifier trained here on the categories, the distance to the nearest picture of the training set, and the
difference of the colours from those of real pictures.
"""

from __future__ import annotations

import torch
from accelerate.utils import set_seed
from datasets import DatasetDict
from emoji_data import CATEGORIES
from image_data import read_pictures
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

__all__ = ["Classifier", "classify", "color_difference", "nearest_distance", "train_classifier"]

STEPS = 300
BINS = 4


class Classifier(nn.Sequential):
    """Three convolutions and a linear layer: (pictures, 3, size, size) to (pictures, categories)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.LazyLinear(len(CATEGORIES)))


def train_classifier(splits: DatasetDict, resolution: int) -> tuple[Classifier, float, float]:
    """Train a classifier of the emoji's categories, mirrored and shifted pictures among them.

    Args:
        splits: All emoji, "train" and "validation".
        resolution: Width and height.

    Returns:
        The classifier, its accuracy on held-out pictures of all categories, and the share of held-out flags among them
        that it calls flags.
    """
    names = list(CATEGORIES)
    pictures = {name: torch.cat(list(read_pictures(rows, "image", resolution))) for name, rows in splits.items()}
    labels = {name: torch.tensor([names.index(c) for c in rows["category"]]) for name, rows in splits.items()}
    set_seed(0)
    classifier = Classifier()
    classifier(pictures["train"][:2])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for _ in tqdm(range(STEPS), desc="classifier", unit="step"):
        rows = torch.randint(len(labels["train"]), (64,))
        shown = pictures["train"][rows].roll(torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
        if torch.rand(()) < 0.5:
            shown = shown.flip(3)
        functional.cross_entropy(classifier(shown), labels["train"][rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    classifier.eval()
    found, flag = classify(classifier, pictures["validation"]), names.index("flag")
    right = found == labels["validation"]
    return classifier, right.float().mean().item(), right[labels["validation"] == flag].float().mean().item()


@torch.no_grad()
def classify(classifier: Classifier, pictures: Tensor) -> Tensor:
    """Return the number of the category that each picture is taken for."""
    return classifier(pictures).argmax(1)


def nearest_distance(pictures: Tensor, references: Tensor) -> float:
    """Return how far pictures are from the nearest of the references: root mean square over pixels, averaged.

    Args:
        pictures: (pictures, 3, size, size), from -1 to 1.
        references: Likewise.
    """
    distances = torch.cdist(pictures.flatten(1), references.flatten(1)).amin(1)
    return (distances / pictures[0].numel() ** 0.5).mean().item()


def color_difference(pictures: Tensor, references: Tensor) -> float:
    """Return the share of pixels whose colour would have to change for both sets to have the same colours.

    Colours count as the same in one of 4 x 4 x 4 cubes.
    """
    return 0.5 * (_histogram(pictures) - _histogram(references)).abs().sum().item()


def _histogram(pictures: Tensor) -> Tensor:
    levels = ((pictures.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)
    cubes = (levels[:, 0] * BINS + levels[:, 1]) * BINS + levels[:, 2]
    return torch.bincount(cubes.flatten(), minlength=BINS**3) / cubes.numel()

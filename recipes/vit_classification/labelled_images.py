"""Pictures with labels: where they come from, what is refused, and which of them are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image as Picture
from sklearn.datasets import load_digits

from recipes.common.recipe_input import InputError, first_line

__all__ = ["describe_data", "load_splits", "read_picture"]

SPLIT_SEED = 0  # the split is part of the task: it stays the same whatever the seed of a run
DARKEST_DIGIT = 16  # the digits' pixels count ink from 0 to 16


def load_splits(args: Any) -> DatasetDict:
    """Return rows of an image column and a column of classes as "train" and "validation".

    Where the data has no split called validation or test, a part of "train" is held out: of each class in proportion,
    and the same rows every time.

    Args:
        args: `dataset_name`, `dataset_config_name`, `image_column`, `label_column` and `validation_fraction` are read.

    Raises:
        InputError: The data cannot be loaded, a column is missing or holds something else, a row has no label, or
            there are too few rows to hold some out.
    """
    name = args.dataset_name or "scikit-learn's digits"
    splits = _load(args) if args.dataset_name else DatasetDict(train=_digits(args.image_column, args.label_column))
    if "train" not in splits:
        raise InputError(f"{name} has no split named train; it has {', '.join(splits)}.")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    chosen = DatasetDict({split: splits[split] for split in ("train", held_out) if split})
    for split, rows in chosen.items():
        if len(rows) == 0:
            raise InputError(f"{name} has no pictures in its split {split}.")
        _check_columns(rows, name, args)
    chosen = _with_classes(chosen, name, args.label_column)
    if held_out is None:
        chosen = _hold_out(chosen["train"], name, args)
    else:
        chosen = DatasetDict(train=chosen["train"], validation=chosen[held_out])
    for rows in chosen.values():  # finds at once whether this column can be read at all
        read_picture(rows, args.image_column, 0)
    return chosen


def describe_data(args: Any) -> dict[str, str]:
    """Return what the run's record says of the data."""
    if args.dataset_name is None:
        return {"name": "scikit-learn digits (UCI Optical Recognition of Handwritten Digits)", "license": "cc-by-4.0"}
    on_the_hub = not Path(args.dataset_name).exists()
    return {"name": args.dataset_name} | ({"id": args.dataset_name} if on_the_hub else {})


def read_picture(rows: Dataset, column: str, index: int) -> Picture.Image:
    """Return one picture in RGB.

    Raises:
        InputError: It cannot be read; the sentence names its file, where it has one.
    """
    try:
        return rows[index][column].convert("RGB")
    except (AttributeError, OSError, SyntaxError, ValueError, Picture.DecompressionBombError) as error:
        stored = rows.cast_column(column, Image(decode=False))[index][column]
        where = (stored or {}).get("path") or f"picture {index}"
        raise InputError(f"cannot read {where}: {first_line(error)}; repair it or take it out.") from error


def _digits(image_column: str, label_column: str) -> Dataset:
    digits = load_digits()
    pixels = (digits.images * (255 / DARKEST_DIGIT)).round().astype("uint8")
    columns = {image_column: list(map(Picture.fromarray, pixels)), label_column: digits.target.tolist()}
    features = Features({image_column: Image(), label_column: ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict(columns, features=features)


def _load(args: Any) -> DatasetDict:
    try:
        return load_dataset(args.dataset_name, args.dataset_config_name)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {args.dataset_name}: {first_line(error)}") from error


def _check_columns(rows: Dataset, name: str, args: Any) -> None:
    for option in ("image_column", "label_column"):
        column = getattr(args, option)
        if column not in rows.column_names:
            raise InputError(
                f"{name} has no column {column!r}; name one of {', '.join(rows.column_names)} as --{option}."
            )
    if not isinstance(rows.features[args.image_column], Image):
        raise InputError(f"the column {args.image_column!r} of {name} holds no images; name another --image_column.")


def _with_classes(splits: DatasetDict, name: str, column: str) -> DatasetDict:
    """The splits with classes as labels; texts and whole numbers become classes in their order."""
    feature = splits["train"].features[column]
    if not isinstance(feature, ClassLabel):
        if not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint", "string", "large_string")):
            raise InputError(f"the column {column!r} of {name} must hold classes, texts or whole numbers.")
        values = sorted(value for value in splits["train"].unique(column) if value is not None)
        classes = ClassLabel(names=list(map(str, values)))
        try:
            splits = splits.cast_column(column, Value("string")).cast_column(column, classes)
        except ValueError as error:
            raise InputError(f"{name} is validated on a class that it does not train: {first_line(error)}") from error
    for split, rows in splits.items():
        if not {None, -1}.isdisjoint(rows.unique(column)):
            raise InputError(f"{name} has rows without a label (None or -1) in its split {split}; take them out.")
    return splits


def _hold_out(rows: Dataset, name: str, args: Any) -> DatasetDict:
    count = round(len(rows) * args.validation_fraction)
    try:
        parts = rows.train_test_split(test_size=count, stratify_by_column=args.label_column, seed=SPLIT_SEED)
    except ValueError as error:
        classes = rows.features[args.label_column].num_classes
        raise InputError(
            f"cannot hold out {count} of the {len(rows)} pictures of {name}, some of each of {classes} classes: "
            f"{first_line(error)} Give another --validation_fraction, or a split named validation."
        ) from error
    return DatasetDict(train=parts["train"], validation=parts["test"])

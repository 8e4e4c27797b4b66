"""Pictures with captions: where they come from, what is refused, and what a frozen base makes of them beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from diffusers import AutoencoderKL
from emoji_data import load_emoji
from PIL import Image as Picture
from PIL import UnidentifiedImageError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from recipes.common.recipe_input import InputError, first_line

__all__ = ["Encoded", "encode", "load_splits", "read_pictures", "text_states", "tokenize"]

READ_AT_ONCE = 32
#: So many pixels go through the autoencoder at once (2 pictures of 512 x 512), which needs some 2 kB for each.
ENCODED_PIXELS = 2**19


def load_splits(args: Any) -> DatasetDict:
    """Return rows of an image column and a caption column as "train" and "validation".

    Args:
        args: `dataset_name`, `dataset_config_name`, `train_data_dir`, `image_column`, `caption_column`,
            `held_out_rows`, `max_train_samples` and `emoji_categories` are read.

    Raises:
        InputError: The data cannot be loaded, a column is missing, or no row with a caption is left.
    """
    if args.dataset_name is None and args.train_data_dir is None:
        splits = load_emoji(args.emoji_categories)
    else:
        splits = _load(args)
    name = args.dataset_name or args.train_data_dir or "the emoji"
    if "train" not in splits:
        raise InputError(f"{name} has no split named train, only {', '.join(splits)}.")
    for split, rows in splits.items():
        splits[split] = _with_captions(rows, name, args)
    if "validation" not in splits:
        count = args.held_out_rows
        if len(splits["train"]) <= count:
            raise InputError(f"{name} has {len(splits['train'])} images with a caption: too few to hold out {count}.")
        held_out = splits["train"].train_test_split(test_size=count, seed=0)
        splits = {"train": held_out["train"], "validation": held_out["test"]}
    chosen = {split: splits[split] for split in ("train", "validation")}
    if args.max_train_samples is not None:
        chosen["train"] = chosen["train"].select(range(min(args.max_train_samples, len(chosen["train"]))))
    for split, rows in chosen.items():
        if len(rows) == 0:
            raise InputError(f"{name} has no image with a caption to use for {split}.")
    return DatasetDict(chosen)


def _load(args: Any) -> DatasetDict:
    wanted = args.dataset_name or args.train_data_dir
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise InputError(f"there is no folder {args.train_data_dir}.")
    try:
        if args.dataset_name is not None:
            return load_dataset(args.dataset_name, args.dataset_config_name)
        return load_dataset("imagefolder", data_dir=args.train_data_dir, drop_labels=True)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {wanted}: {first_line(error)}") from error


def _with_captions(rows: Dataset, name: str, args: Any) -> Dataset:
    """The rows that have a caption, images not decoded yet; refuse a column that is not there."""
    for option in ("image_column", "caption_column"):
        if getattr(args, option) not in rows.column_names:
            hint = " (an image folder needs a metadata.jsonl with file_name and text)" if args.train_data_dir else ""
            raise InputError(
                f"{name} has no column {getattr(args, option)!r}{hint}; "
                f"name one of {', '.join(rows.column_names)} as --{option}."
            )
    if not isinstance(rows.features[args.image_column], Image):
        raise InputError(f"the column {args.image_column!r} of {name} holds no images; name another --image_column.")
    captions = rows[args.caption_column]
    wrong = next((caption for caption in captions if not isinstance(caption, str | None)), None)
    if wrong is not None:
        raise InputError(f"the column {args.caption_column!r} of {name} holds {wrong!r}, but captions must be texts.")
    return rows.select([index for index, caption in enumerate(captions) if caption and caption.strip()])


def read_pictures(
    rows: Dataset, column: str, resolution: int, *, resize: bool = True, desc: str | None = None
) -> Iterator[Tensor]:
    """Yield pictures in parts, as floats from -1 to 1 of shape (part, 3, resolution, resolution).

    The shorter side is brought to `resolution` and the middle is cut out; transparent parts become white.

    Args:
        rows: Data set with an image column.
        column: Its name.
        resolution: Width and height, in pixels.
        resize: Whether pictures of another size are allowed.
        desc: Words for the progress bar; None: no bar.

    Raises:
        InputError: A picture cannot be read, or has another size and `resize` is off.
    """
    files = rows.cast_column(column, Image(decode=False))
    part = []
    for index in tqdm(range(len(rows)), desc=desc, unit="image", disable=desc is None):
        part.append(_read(rows, files, column, index, resolution, resize))
        if len(part) == READ_AT_ONCE or index == len(rows) - 1:
            yield torch.stack(part).float().div(127.5).sub(1)
            part = []


def _read(rows: Dataset, files: Dataset, column: str, index: int, resolution: int, resize: bool) -> Tensor:
    where = files[index][column].get("path") or f"image {index}"
    try:
        picture = rows[index][column].convert("RGBA")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Picture.DecompressionBombError) as error:
        raise InputError(f"cannot read {where}: {first_line(error)}; repair it or take it out.") from error
    width, height = picture.size
    if not resize and (width, height) != (resolution, resolution):
        raise InputError(
            f"{where} has {width} x {height} pixels, not {resolution} x {resolution}; "
            "allow --resize true, or give another --resolution."
        )
    picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    picture = picture.resize(size, Picture.Resampling.LANCZOS)
    picture = picture.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


@dataclass
class Encoded:
    """What a frozen autoencoder and text encoder make of pictures and captions, in main memory.

    Attributes:
        mean: Mean of each picture's latents, (rows, channels, height, width), scaled.
        std: Their standard deviation, likewise.
        tokens: The captions, (rows, length).
        states: What the text encoder makes of them, (rows, length, width); None where it is trained itself.
        captions: The captions as they were.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    states: Tensor | None
    captions: list[str]

    def __len__(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def encode(
    rows: Dataset, args: Any, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase, text_encoder: nn.Module | None
) -> Encoded:
    """Encode all pictures and captions once, instead of in every epoch; a picture that cannot be read is found here.

    Args:
        rows: Pictures and captions.
        args: `image_column`, `caption_column`, `resolution`, `resize` and `disable_tqdm` are read.
        vae: The autoencoder, on the device and in the type to compute with.
        tokenizer: For the captions.
        text_encoder: None where it is trained: its outputs are not worth keeping then.

    Returns:
        The latents in float32, the text states in the text encoder's type.

    Raises:
        InputError: As `read_pictures`.
    """
    desc = None if args.disable_tqdm else "encoding the images"
    means, deviations = [], []
    at_once = max(1, ENCODED_PIXELS // args.resolution**2)
    for read in read_pictures(rows, args.image_column, args.resolution, resize=args.resize, desc=desc):
        for part in read.split(at_once):
            latents = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
            means.append(latents.mean.float().cpu() * vae.config.scaling_factor)
            deviations.append(latents.std.float().cpu() * vae.config.scaling_factor)
    captions = list(rows[args.caption_column])
    tokens = tokenize(tokenizer, captions)
    states = None if text_encoder is None else text_states(text_encoder, tokens)
    return Encoded(torch.cat(means), torch.cat(deviations), tokens, states, captions)


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """Return token ids of shape (captions, length), padded and cut to the tokenizer's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def text_states(text_encoder: nn.Module, tokens: Tensor) -> Tensor:
    """Return what the text encoder makes of tokens, in main memory."""
    parts = tokens.split(READ_AT_ONCE)
    return torch.cat([text_encoder(part.to(text_encoder.device))[0].cpu() for part in parts])

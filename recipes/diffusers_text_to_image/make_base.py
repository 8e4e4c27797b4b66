"""Train the small parts around a UNet from nothing, on emoji: tokenizer, CLIP text encoder, autoencoder.

    python recipes/diffusers_text_to_image/make_base.py --output_dir runs/diffusers_parts

Then train.py trains the UNet between them, and saves all as a pipeline in Stable Diffusion layout:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/diffusers_text_to_image/train.py recipes/diffusers_text_to_image/base.yaml

Tokenizer: byte-level BPE on the captions. Text encoder: as half of a CLIP model, which learns to match captions and
pictures. Autoencoder: reconstructs pictures, also mirrored ones, from 8 x 8 x 4 numbers. Flags
are left out everywhere, so that a LoRA has something to learn. The scheduler is Stable Diffusion's; of the UNet there
is a configuration and no weights, so that nobody takes the folder for a pipeline.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from emoji_data import CATEGORIES, load_emoji
from image_data import read_pictures
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, get_scheduler

from recipes.common.recipe_input import InputError, parse_config_and_flags

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_WORDS = 24
LEFT_OUT = "flag"
KL_WEIGHT = 1e-5
#: Stable Diffusion 1.5's noise, drawn with DDIM.
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass
class BaseArguments:
    """How long each part is trained."""

    output_dir: str = field(default="runs/diffusers_parts", metadata={"help": "Folder to make."})
    resolution: int = field(default=32, metadata={"help": "Width and height of the pictures."})
    autoencoder_steps: int = field(default=1500, metadata={"help": "Steps of 16 pictures."})
    clip_steps: int = field(default=400, metadata={"help": "Steps of 64 pairs."})
    width: int = field(default=128, metadata={"help": "Width of the text encoder."})
    channels: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "Channels of the UNet's levels."})
    seed: int = field(default=0, metadata={"help": "Random seed."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    (args,) = parse_config_and_flags(
        (BaseArguments,), sys.argv[1:] if argv is None else argv, "make_base.py [--key value]"
    )
    folder = Path(args.output_dir)
    if folder.exists():
        raise InputError(f"{folder} exists; delete it, or name another --output_dir.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = load_emoji([category for category in CATEGORIES if category != LEFT_OUT])
    pictures = {
        name: torch.cat(list(read_pictures(rows, "image", args.resolution))).to(device) for name, rows in splits.items()
    }
    captions = {name: list(rows["text"]) for name, rows in splits.items()}
    set_seed(args.seed)
    tokenizer = train_tokenizer(captions["train"])
    tokens = {
        name: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        for name, texts in captions.items()
    }
    text_encoder, recall = train_text_encoder(args, tokenizer, pictures, tokens)
    set_seed(args.seed)
    autoencoder, error = train_autoencoder(args, pictures)
    figures = {"held-out mean squared error of the autoencoder": error, "held-out recall at 5 of CLIP": recall}

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    autoencoder.save_pretrained(unfinished / "vae")
    text_encoder.save_pretrained(unfinished / "text_encoder")
    tokenizer.save_pretrained(unfinished / "tokenizer")
    DDIMScheduler(**SCHEDULER).save_pretrained(unfinished / "scheduler")
    new_unet(args, autoencoder).save_config(unfinished / "unet")
    (unfinished / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    unfinished.rename(folder)
    print(f"\nparts: {folder}\n" + "\n".join(f"{name}: {value:.4f}" for name, value in figures.items()))
    return figures


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train a BPE as CLIP's: lower case, words end in `</w>`, no merges across words."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # CLIP's vocabulary has each byte also as the end of a word.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[START, END, *(f"{letter}</w>" for letter in letters)],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_WORDS)


def train_text_encoder(
    args: BaseArguments, tokenizer: CLIPTokenizer, pictures: dict, tokens: dict
) -> tuple[CLIPTextModel, float]:
    """Train CLIP; return its text encoder, and how often a held-out caption's picture is among its 5 nearest."""
    shape = {"hidden_size": args.width, "intermediate_size": 2 * args.width, "num_attention_heads": 4}
    text = {
        **shape,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shape, "num_hidden_layers": 3, "image_size": args.resolution, "patch_size": args.resolution // 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).to(pictures["train"].device)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, args.clip_steps // 10, args.clip_steps)
    steps = tqdm(range(args.clip_steps), desc="text encoder", unit="step")
    for _ in steps:
        rows = torch.randperm(len(tokens["train"]), device=tokens["train"].device)[:64]
        shift = torch.randint(-2, 3, (2,)).tolist()
        shifted = pictures["train"][rows].roll(shift, dims=(2, 3))
        loss = clip(input_ids=tokens["train"][rows], pixel_values=shifted, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        scores = clip(input_ids=tokens["validation"], pixel_values=pictures["validation"]).logits_per_text
    nearest = scores.topk(5).indices
    own = torch.arange(len(nearest), device=nearest.device)[:, None]
    encoder = CLIPTextModel(clip.config.text_config)
    prefix = "text_model."
    weights = {name: value for name, value in clip.state_dict().items() if name.startswith(prefix)}
    if not any(name.startswith(prefix) for name in encoder.state_dict()):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    encoder.load_state_dict(weights)
    return encoder.to("cpu"), (nearest == own).any(1).float().mean().item()


def train_autoencoder(args: BaseArguments, pictures: dict) -> tuple[AutoencoderKL, float]:
    """Train the autoencoder; return it, and its mean squared error on held-out pictures (in the range -1 to 1)."""
    channels = (16, 32, 64)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        norm_num_groups=8,
        sample_size=args.resolution,
    ).to(pictures["train"].device)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, args.autoencoder_steps // 20, args.autoencoder_steps)
    steps = tqdm(range(args.autoencoder_steps), desc="autoencoder", unit="step")
    for _ in steps:
        shown = pictures["train"][torch.randint(len(pictures["train"]), (16,))]
        if torch.rand(()) < 0.5:
            shown = shown.flip(3)
        posterior = autoencoder.encode(shown).latent_dist
        made = autoencoder.decode(posterior.sample()).sample
        error = functional.mse_loss(made, shown)
        loss = error + functional.l1_loss(made, shown) + KL_WEIGHT * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.set_postfix(mse=f"{error.item():.4f}")
    autoencoder.eval()
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures["train"].split(64)])
        held_out = pictures["validation"]
        made = torch.cat([autoencoder(part).sample for part in held_out.split(64)])
    # Diffusion works on latents whose standard deviation is 1.
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    return autoencoder.to("cpu"), functional.mse_loss(made, held_out).item()


def new_unet(args: BaseArguments, autoencoder: AutoencoderKL) -> UNet2DConditionModel:
    levels = len(args.channels)
    return UNet2DConditionModel(
        sample_size=args.resolution // 2 ** (len(autoencoder.config.block_out_channels) - 1),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=tuple(args.channels),
        layers_per_block=1,
        cross_attention_dim=args.width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"make_base.py: {problem}")

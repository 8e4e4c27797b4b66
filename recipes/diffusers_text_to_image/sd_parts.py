"""A checkpoint in Stable Diffusion layout: load its parts, put a LoRA on them, save what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from recipes.common.recipe_input import InputError, first_line

__all__ = ["Denoiser", "Parts", "add_lora", "load_parts", "make_pipeline", "sample", "save_lora"]

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass
class Parts:
    """What a Stable Diffusion checkpoint consists of; `scheduler` is what it samples with, `noise` what trains it."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: PreTrainedTokenizerBase
    unet: UNet2DConditionModel
    scheduler: Any
    noise: DDPMScheduler


class Denoiser(nn.Module):
    """The UNet, and the text encoder where it is trained too, as one module for Accelerate."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        # Of these modules FSDP2 shards each by itself.
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [n for part in self.children() for n in part._no_split_modules or () if n in kinds]

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Return the prediction for noisy latents; `text`: tokens, or the states of a frozen text encoder."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        if not torch.is_autocast_enabled(noisy.device.type):  # DeepSpeed's half precision
            noisy, states = noisy.to(self.unet.dtype), states.to(self.unet.dtype)
        return self.unet(noisy, timesteps, states).sample


def load_parts(args: Any) -> Parts:
    """Load the parts of a checkpoint, all frozen.

    Args:
        args: `pretrained_model_name_or_path`, `revision` and `new_unet` are read.

    Raises:
        InputError: There is no such checkpoint, it is not in Stable Diffusion layout, or a part cannot be loaded.
    """
    name = args.pretrained_model_name_or_path
    if name is None:
        raise InputError(
            "there is no --pretrained_model_name_or_path: name a checkpoint, or make one with make_base.py (README.md)."
        )
    _refuse_other_layouts(Path(name), name)
    where = {"revision": args.revision}
    try:
        config = UNet2DConditionModel.load_config(name, subfolder="unet", **where)
        if config.get("addition_embed_type") is not None:  # known before gigabytes are downloaded
            raise InputError(
                f"{name} is of the Stable Diffusion XL kind; this recipe trains Stable Diffusion 1.x and 2.x."
            )
        if args.new_unet:
            unet = UNet2DConditionModel.from_config(config)
        else:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **where)
        parts = Parts(
            vae=AutoencoderKL.from_pretrained(name, subfolder="vae", **where),
            text_encoder=CLIPTextModel.from_pretrained(name, subfolder="text_encoder", **where),
            tokenizer=AutoTokenizer.from_pretrained(name, subfolder="tokenizer", **where),
            unet=unet,
            scheduler=_scheduler(name, where),
            noise=DDPMScheduler.from_pretrained(name, subfolder="scheduler", **where),
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load {name} as a Stable Diffusion checkpoint: {first_line(error)}") from error
    width, cross = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if width != cross:
        raise InputError(f"{name}: the text encoder is {width} wide, but the UNet takes {cross}; they do not belong.")
    if parts.noise.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"{name} predicts {parts.noise.config.prediction_type}; allowed: epsilon, v_prediction.")
    for module in (parts.vae, parts.text_encoder, parts.unet):
        module.requires_grad_(False)
        module.eval()
    return parts


def _refuse_other_layouts(folder: Path, name: str) -> None:
    if not folder.is_dir():
        return  # a name on the hub
    if (folder / "transformer").is_dir() or (folder / "text_encoder_2").is_dir():
        raise InputError(
            f"{name} has a transformer or a second text encoder; this recipe trains Stable Diffusion 1, 2."
        )
    for part, file in (
        ("unet", "config"),
        ("vae", "config"),
        ("text_encoder", "config"),
        ("scheduler", "scheduler_config"),
    ):
        if not (folder / part / f"{file}.json").is_file():
            raise InputError(f"{name} is no checkpoint in Stable Diffusion layout: it has no {part}/{file}.json.")


def _scheduler(name: str, where: dict[str, Any]) -> Any:
    """The scheduler that the checkpoint names, of whatever class."""
    import diffusers

    config = DDPMScheduler.load_config(name, subfolder="scheduler", **where)
    return getattr(diffusers, config["_class_name"]).from_config(config)


def add_lora(parts: Parts, args: Any) -> None:
    """Put LoRA adapters on the UNet, and on the text encoder with `train_text_encoder`.

    Raises:
        InputError: An option is out of range, or the target modules are not in the UNet.
    """

    def config(targets: list[str]) -> LoraConfig:
        return LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=targets,
        )

    try:
        parts.unet.add_adapter(config(args.lora_target_modules))
        if args.train_text_encoder:
            parts.text_encoder.add_adapter(config(TEXT_ENCODER_TARGETS))
    except ValueError as error:
        layers = (nn.Linear, nn.Conv2d)
        known = {_ending(name) for name, module in parts.unet.named_modules() if isinstance(module, layers)}
        raise InputError(
            f"cannot add the adapter: {first_line(error)} Layers of this UNet: {', '.join(sorted(known))}."
        ) from error


def _ending(name: str) -> str:
    """The last word of a module's name, with the one before it where the last is a number (`to_out.0`)."""
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() else last


def make_pipeline(parts: Parts) -> StableDiffusionPipeline:
    """Return the parts as a pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_lora(parts: Parts, folder: str | Path) -> None:
    """Save the adapters where `pipeline.load_lora_weights(folder)` finds them."""
    layers = {"unet_lora_layers": parts.unet, "text_encoder_lora_layers": parts.text_encoder}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        **{
            name: convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
            for name, module in layers.items()
            if getattr(module, "peft_config", None)
        },
    )


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, prompts: Iterable[str], args: Any) -> list[Any]:
    """Draw a picture for each prompt, each from a noise of its own that depends on the seed alone."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(prompts)
    return pipeline(
        prompts,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(len(prompts))],
        height=args.resolution,
        width=args.resolution,
    ).images

"""What is measured and drawn of a diffusion model: loss at fixed timesteps and noise, and pictures in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from image_data import Encoded
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TIMESTEPS", "denoising_loss", "denoising_target", "save_grid"]

#: In so many equal parts is the range of timesteps divided; the middle of each is looked at.
TIMESTEPS = 8
SHOWN_WIDTH = 96


@torch.no_grad()
def denoising_loss(model: nn.Module, data: Encoded, noise: DDPMScheduler, device: Any, batch_size: int) -> float:
    """Return the mean squared error of the prediction, the same for the same weights whenever it is called.

    Every row is looked at once at each of `TIMESTEPS` fixed timesteps, with a noise that depends on its number alone.

    Args:
        model: A `Denoiser`; its training mode is as before afterwards.
        data: Rows to evaluate on.
        noise: The scheduler that adds the noise.
        device: Where the model is.
        batch_size: Rows at a time.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    total, length = 0.0, noise.config.num_train_timesteps
    for step in range(TIMESTEPS):
        time = (2 * step + 1) * length // (2 * TIMESTEPS)
        drawn = torch.randn(data.mean.shape, generator=generator)
        for rows in torch.arange(len(data)).split(batch_size):
            latents, added = data.mean[rows].to(device), drawn[rows].to(device)
            timesteps = torch.full((len(rows),), time, device=device)
            text = (data.tokens if data.states is None else data.states)[rows].to(device)
            predicted = model(noise.add_noise(latents, added, timesteps), timesteps, text)
            target = denoising_target(noise, latents, added, timesteps)
            total += functional.mse_loss(predicted.float(), target).item() * len(rows)
    model.train(was_training)
    return total / (TIMESTEPS * len(data))


def denoising_target(noise: DDPMScheduler, latents: Tensor, added: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the checkpoint's scheduler says is to be predicted: the noise, or the velocity."""
    if noise.config.prediction_type == "v_prediction":
        return noise.get_velocity(latents, added, timesteps)
    return added


def save_grid(columns: dict[str, Sequence[Image.Image]], prompts: Sequence[str], path: Path) -> Path:
    """Save pictures as a PNG: one line for each prompt, one column for each heading, small ones enlarged.

    Args:
        columns: Heading to pictures, one for each prompt.
        prompts: What was asked for.
        path: The file.
    """
    width = max(SHOWN_WIDTH, min(256, next(iter(columns.values()))[0].width))
    margin, line, words = 6, width + 6, 230
    canvas = Image.new("RGB", (words + len(columns) * line, 24 + len(prompts) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for x, (heading, pictures) in enumerate(columns.items()):
        draw.text((words + x * line, margin), heading, fill="black")
        for y, picture in enumerate(pictures):
            canvas.paste(picture.resize((width, width), Image.Resampling.NEAREST), (words + x * line, 24 + y * line))
    for y, prompt in enumerate(prompts):
        text = prompt if len(prompt) <= 34 else prompt[:33] + "…"
        draw.text((margin, 24 + y * line + width // 2 - 6), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path

"""FSDP2 and DeepSpeed: what they need to know, what they cannot, and whole weights out of those that lie in pieces."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from sd_parts import Denoiser, Parts
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from recipes.common.recipe_input import InputError

__all__ = ["Whole", "in_pieces", "pieces_like", "prepare_engine", "sharded_again", "whole_tensors"]

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def in_pieces(accelerator: Accelerator) -> bool:
    """Whether a device may hold but a piece of the model or of the optimizer's state."""
    return accelerator.distributed_type not in WHOLE


def prepare_engine(accelerator: Accelerator, args: Any) -> None:
    """Refuse what does not work under Accelerate's engine, and tell DeepSpeed this recipe's options.

    Raises:
        InputError: With the cure.
    """
    kind = accelerator.distributed_type
    for name, asked in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and kind != asked:
            raise InputError(
                f"Accelerate was configured for {asked.value} and made {kind.value} of it, as it does on a CPU; "
                "choose another configuration, and no --use_cpu for GPUs."
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError("this recipe does not run under FSDP1; set fsdp_version: 2 (accelerate_configs/fsdp2.yaml).")
    if kind == DistributedType.DEEPSPEED:
        if args.use_ema:
            raise InputError(
                "use_ema averages float32 weights, which DeepSpeed keeps in flat tensors; "
                "use accelerate_configs/fsdp2.yaml or ddp.yaml, or --use_ema false."
            )
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3 and not plugin.deepspeed_config["zero_optimization"].get(
            "stage3_gather_16bit_weights_on_model_save"
        ):
            raise InputError("with ZeRO-3 the weights can be saved only with zero3_save_16bit_model: true; set it.")
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }
        # ZeRO-3 would have transformers cut models into pieces as it loads them, of which most are never trained.
        unset_hf_deepspeed_config()
    elif kind not in (*WHOLE, DistributedType.FSDP):
        raise InputError(
            f"this recipe does not run under {kind.value}; use accelerate_configs/one_gpu.yaml, ddp.yaml, fsdp2.yaml "
            "or zero2.yaml."
        )


class Whole:
    """The parts with whole weights, on the main process alone.

    Args:
        parts: As they are before Accelerate prepares them.
        trains_text: Whether the text encoder is trained, too.
        accelerator: What will prepare them.
    """

    def __init__(self, parts: Parts, trains_text: bool, accelerator: Accelerator) -> None:
        self._parts, self._accelerator, self._copy = parts, accelerator, None
        if in_pieces(accelerator) and accelerator.is_main_process:
            trained = {"unet": parts.unet, **({"text_encoder": parts.text_encoder} if trains_text else {})}
            copies: dict[str, Any] = {name: copy.deepcopy(module).cpu() for name, module in trained.items()}
            self._copy = replace(parts, **copies)
            self._loads = Denoiser(copies["unet"], copies.get("text_encoder"))

    def gather(self, model: nn.Module) -> Parts | None:
        """The parts as they are now, None on other processes than the main one. All processes must call it."""
        if not in_pieces(self._accelerator):
            return self._parts if self._accelerator.is_main_process else None
        weights = self._accelerator.get_state_dict(model)
        if self._copy is not None:
            self._loads.load_state_dict(weights)
        return self._copy

    @contextlib.contextmanager
    def on_device(self, parts: Parts) -> Iterator[None]:
        """Gathered parts lie on the CPU; while they draw, on the device."""
        moved = (self._loads,) if parts is self._copy else ()
        for module in moved:
            module.to(self._accelerator.device)
        yield
        for module in moved:
            module.to("cpu")


def sharded_again(model: nn.Module) -> None:
    """After an evaluation FSDP2 may leave whole weights, which would not see a change of its shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def whole_tensors(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Whole tensors of DTensors. All processes must call it."""
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]


def pieces_like(tensors: list[torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Whole tensors cut as the parameters are, where these are DTensors. All processes must call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    return [
        distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor
        for tensor, p in zip(tensors, parameters, strict=True)
    ]

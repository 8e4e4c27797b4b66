"""Builds the optimizer that `--optim` names, as transformers' Trainer would; an unknown name is an error."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from hf_sai import param_groups
from recipes.common.recipe_input import OPTIMIZER_SETTINGS, InputError, first_line

__all__ = ["build_optimizer", "read_settings"]


def read_settings(args: Any) -> TrainingArguments:
    """Check the optimizer's options; call it before an `Accelerator` is made, whose state Trainer's arguments reset.

    Args:
        args: `output_dir`, `use_cpu` and what `OPTIMIZER_SETTINGS` names are read.

    Raises:
        InputError: There is no such optimizer, or an option has an impossible value.
    """
    try:
        return TrainingArguments(
            args.output_dir,
            use_cpu=args.use_cpu,
            report_to="none",
            **{key: getattr(args, key) for key in OPTIMIZER_SETTINGS},
        )
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"cannot use the optimizer {args.optim}: {first_line(error)}") from error


def build_optimizer(settings: TrainingArguments, model: nn.Module) -> Optimizer:
    """Build the optimizer over the model's trainable parameters, in hf_sai's named groups.

    Args:
        settings: What `read_settings` returned.
        model: Its parameters that require a gradient are trained.

    Raises:
        InputError: The optimizer is not installed, refuses its options, or steps within the backward pass.
    """
    name = settings.optim.value
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings, model)
        if "model" in options or "optimizer_dict" in options:  # LOMO; GaLore and APOLLO layer by layer
            raise InputError(f"{name} steps within the backward pass, which only Trainer supports; choose another.")
        groups = options.pop("params", None) or _groups(settings, model)
        return kind(groups, **options)
    except InputError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"cannot build the optimizer {name}: {first_line(error)}") from error


def _groups(settings: TrainingArguments, model: nn.Module) -> list[dict[str, Any]]:
    """hf_sai's groups with the keys that every optimizer understands, so that all decay the same parameters."""
    return [
        {
            "params": [parameter for _, parameter in group["params"]],
            "name": group["name"],
            "weight_decay": group["weight_decay"],
        }
        for group in param_groups(model, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    ]

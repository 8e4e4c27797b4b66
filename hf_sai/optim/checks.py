"""What SGDSaI accepts: options in range, parameters it can train, states it can load."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from hf_sai.distributed.fsdp1 import refuse_flat_parameter
from hf_sai.optim.gradient_norm import NORMALIZED
from hf_sai.optim.gsnr import UNMEASURED
from hf_sai.optim.momentum import check_momentum_dtype

__all__ = ["check_options", "check_params", "with_float_gsnr"]


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an option out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, but has shape {tuple(lr.shape)}.")
    limits = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "eps": math.inf}
    for name, limit in limits.items():
        value = options[name]
        if name == "lr" and isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < limit:
            allowed = "a finite number >= 0" if limit == math.inf else f"a number in [0, {limit:g})"
            raise ValueError(f"{name} must be {allowed}, but is {options[name]!r}.")
    for name in ("normalize", "maximize", "stochastic_rounding", "foreach", "fused"):
        allowed_values = (True, False, None) if name in ("foreach", "fused") else (True, False)
        if not any(options[name] is value for value in allowed_values):
            raise ValueError(f"{name} must be one of {allowed_values}, but is {options[name]!r}.")
    how = options["normalize_gradient"]
    if how is not None and how not in NORMALIZED:
        raise ValueError(f"normalize_gradient must be None or one of {NORMALIZED}, but is {how!r}.")
    if how is not None and options["normalize"]:
        raise ValueError(
            f"normalize and normalize_gradient={how!r} are two ways of scaling updates; choose one of them."
        )
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused are both True; choose one, or leave both at None.")
    check_momentum_dtype(options["momentum_dtype"])


def check_params(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot be trained."""
    for index, p in enumerate(group["params"]):
        name = group["param_names"][index] if "param_names" in group else f"number {index}"
        refuse_flat_parameter(p)
        if p.is_complex():
            raise ValueError(
                f"Parameter {name} is complex ({p.dtype}), which SGD-SaI does not support. "
                "Make its real view the parameter: torch.nn.Parameter(torch.view_as_real(p.detach()))."
            )


def with_float_gsnr(state: Any) -> Any:
    """A parameter's saved state with its g-SNR as a float."""
    if not isinstance(state, dict) or "gsnr" not in state:
        return state
    if isinstance(state["gsnr"], list):  # of a flat tensor under DeepSpeed ZeRO
        return state
    gsnr = float(state["gsnr"])
    return {**state, "gsnr": gsnr if math.isfinite(gsnr) else UNMEASURED}

"""The rivals: how each is built from a model and its settings, and along which axes it is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.quality.ideas import IDEAS, laid_over, with_beta2, with_qkv_apart
from benchmarks.quality.sinkgd import SinkGD
from hf_sai import create_sgd_sai_optimizer, param_groups

__all__ = ["RIVALS", "VARIANTS", "Rival", "Settings"]

#: ``learning_rate``, ``weight_decay`` and the other axes of a rival by their names.
Settings = Mapping[str, float]

DECAYS = (0.0, 0.01, 0.1)
BETAS = {"beta1": (0.8, 0.9), "beta2": (0.95, 0.99, 0.999)}
MOMENTA = {"momentum": (0.8, 0.9, 0.95)}


@dataclass(frozen=True)
class Rival:
    """An optimizer, where its search starts and what it looks at.

    Attributes:
        build: Makes the optimizers; together they train every parameter.
        start: Its usual settings.
        axes: Other values of them. The learning rate and the weight decay are axes of all.
        times_adamw: The first learning rate, in units of the one that AdamW's grid starts from.
        constant: Whether its learning rate stays after warmup, where the others follow the task's schedule.
    """

    build: Callable[[nn.Module, Settings], list[Optimizer]]
    start: dict[str, float]
    axes: dict[str, tuple[float, ...]]
    times_adamw: float = 1.0
    constant: bool = False
    decays: tuple[float, ...] = field(default=DECAYS)

    def first(self, learning_rate: float) -> dict[str, float]:
        """The settings that the search starts with, from AdamW's usual learning rate for the task."""
        rate = float(f"{self.times_adamw * learning_rate:.3g}")
        return {"learning_rate": rate, "weight_decay": 0.01, **self.start}

    def all_axes(self) -> dict[str, tuple[float, ...]]:
        """What is looked at besides the learning rate."""
        return {"weight_decay": self.decays, **self.axes}


def _groups(model: nn.Module, s: Settings) -> list[dict[str, Any]]:
    """hf_sai's groups with the keys that every optimizer understands, so that all decay the same parameters."""
    return [
        {"params": [parameter for _, parameter in group["params"]], "weight_decay": group["weight_decay"]}
        for group in param_groups(model, lr=s["learning_rate"], weight_decay=s["weight_decay"])
    ]


def _with_matrices_apart(model: nn.Module, s: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of the hidden matrices and of everything else; hidden is what stands in a numbered layer."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in embeddings and any(map(str.isdigit, name.split(".")))
    }
    apart: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in _groups(model, s):
        for index, own in enumerate(apart):
            if params := [p for p in group["params"] if (id(p) not in hidden) == bool(index)]:
                own.append({**group, "params": params})
    return apart


def _betas(s: Settings) -> tuple[float, float]:
    return s["beta1"], s["beta2"]


def _adamw(model: nn.Module, s: Settings) -> list[Optimizer]:
    return [torch.optim.AdamW(_groups(model, s), lr=s["learning_rate"], betas=_betas(s), fused=True)]


def _nadamw(model: nn.Module, s: Settings) -> list[Optimizer]:
    # With torch's own momentum_decay of 0.004 the gradient of the step weighs half in the first thousands of steps; a
    # large one makes the update that of Nesterov's momentum. Both are tried.
    return [
        torch.optim.NAdam(
            _groups(model, s),
            lr=s["learning_rate"],
            betas=_betas(s),
            momentum_decay=s["momentum_decay"],
            decoupled_weight_decay=True,
        )
    ]


def _muon(model: nn.Module, s: Settings) -> list[Optimizer]:
    matrices, rest = _with_matrices_apart(model, s)
    lr = s["learning_rate"]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=s["momentum"], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=_betas(s), fused=True),
    ]


def _sinkgd(model: nn.Module, s: Settings) -> list[Optimizer]:
    matrices, rest = _with_matrices_apart(model, s)
    lr = s["learning_rate"]
    return [
        SinkGD(matrices, lr=lr * s["matrix_ratio"]),
        torch.optim.AdamW(rest, lr=lr, betas=_betas(s), fused=True),
    ]


def _lion(model: nn.Module, s: Settings) -> list[Optimizer]:
    from pytorch_optimizer import Lion

    return [Lion(_groups(model, s), lr=s["learning_rate"], betas=_betas(s))]


def _schedule_free(model: nn.Module, s: Settings) -> list[Optimizer]:
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(_groups(model, s), lr=s["learning_rate"], betas=_betas(s))]


def _adam_mini(model: nn.Module, s: Settings) -> list[Optimizer]:
    """The official one, which tells blocks by their names; it knows neither GPT-2's ``c_attn`` nor T5's ``q``."""
    from adam_mini import Adam_mini

    config: Any = model.config
    optimizer = Adam_mini(
        model.named_parameters(),
        lr=s["learning_rate"],
        betas=_betas(s),
        weight_decay=s["weight_decay"],
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        verbose=False,
    )
    if any("embed" in name and p.ndim != 2 for name, p in model.named_parameters()):
        optimizer.embd_names = set()  # it takes every embedding for a matrix, and stops at ViT's positions
    return [optimizer]


def _official(model: nn.Module, s: Settings) -> list[Optimizer]:
    from sgd_sai import SGD_sai

    return [SGD_sai(_groups(model, s), lr=s["learning_rate"], momentum=s["momentum"])]


def _sai(update: str, *, with_gsnr: bool = True, **options: Any) -> Callable[[nn.Module, Settings], list[Optimizer]]:
    def build(model: nn.Module, s: Settings) -> list[Optimizer]:
        groups = {"lr": s["learning_rate"], "weight_decay": s["weight_decay"], "momentum": s["momentum"]}
        optimizer = create_sgd_sai_optimizer(model, update=update, **groups, **options)
        if not with_gsnr:
            for parameter in model.parameters():  # what is measured stays: each takes the root of its size for its own
                optimizer.state[parameter]["gsnr"] = math.sqrt(parameter.numel())
        return [optimizer]

    return build


ADAM = {"beta1": 0.9, "beta2": 0.999}

RIVALS = {
    "adamw": Rival(_adamw, ADAM, BETAS),
    "muon": Rival(_muon, {"momentum": 0.95, **ADAM}, {**MOMENTA, **BETAS}, times_adamw=2),
    "nadamw": Rival(_nadamw, {**ADAM, "momentum_decay": 1e3}, {**BETAS, "momentum_decay": (4e-3, 1e3)}),
    "lion": Rival(_lion, {"beta1": 0.9, "beta2": 0.99}, BETAS, times_adamw=0.125, decays=(*DECAYS, 1.0)),
    "sinkgd": Rival(_sinkgd, {**ADAM, "matrix_ratio": 1.0}, {**BETAS, "matrix_ratio": (0.2, 1.0)}),
    "schedule_free": Rival(_schedule_free, ADAM, {**BETAS, "beta1": (0.9, 0.95, 0.98)}, constant=True),
    "adam_mini": Rival(_adam_mini, ADAM, BETAS),
    "official": Rival(_official, {"momentum": 0.9}, MOMENTA, times_adamw=2.5),
    "published": Rival(_sai("published"), {"momentum": 0.9}, MOMENTA, times_adamw=2.5),
    "factored": Rival(_sai("factored"), {"momentum": 0.8}, MOMENTA),
    "averaged": Rival(_sai("averaged"), {"momentum": 0.8}, {"momentum": (0.6, 0.8, 0.9)}, constant=True),
    "orthogonal": Rival(_sai("orthogonal"), {"momentum": 0.9}, MOMENTA, times_adamw=2),
}

#: What a rule is without one of its parts, with a smaller state, or with a cheap idea on top; run where they are named.
VARIANTS = {
    **{f"{rule}_without_gsnr": replace(RIVALS[rule], build=_sai(rule, with_gsnr=False))
       for rule in ("published", "factored", "orthogonal")},
    **{f"{rule}_{bits}": replace(RIVALS[rule], build=_sai(rule, momentum_dtype=bits))
       for rule in ("factored", "orthogonal") for bits in ("8bit", "4bit")},
    **{f"factored_{name}": replace(RIVALS["factored"], build=laid_over(_sai("factored"), idea))
       for name, idea in IDEAS.items()},
    **{f"orthogonal_{name}": replace(RIVALS["orthogonal"], build=laid_over(_sai("orthogonal"), IDEAS[name]))
       for name in ("cautious_mask", "cautious_decay")},
    "orthogonal_qkv_apart": replace(RIVALS["orthogonal"], build=with_qkv_apart(_sai("orthogonal"))),
    "factored_beta2_0.99": replace(RIVALS["factored"], build=with_beta2(_sai("factored", foreach=True), 0.99)),
}  # fmt: skip

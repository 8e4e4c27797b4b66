"""The optimizers that are compared: every rule and every path of ours, and torch's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sai import SGDSaI, param_groups
from hf_sai.optim import rules
from hf_sai.optim.rules import averaged, factored
from hf_sai.optim.update import KERNELS, Kernel

__all__ = [
    "ADAMW",
    "MUON",
    "OFFICIAL",
    "PATHS",
    "RIVALS",
    "RULES",
    "SGD",
    "Contender",
    "TorchMuon",
    "groups_of",
    "kernels",
    "needed",
    "sai",
]

ADAMW, SGD, MUON = "torch AdamW, fused", "torch SGD with momentum, fused", "torch Muon (AdamW elsewhere)"

RULES = list(rules.RULES)

#: What kernels do beside the update.
FASTER: tuple[list[Any], ...] = (averaged.FASTER, factored.FASTER)

#: How an update of full precision can be made -> (options, kernels that are left out).
PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, ""),
    "foreach": ({"foreach": True}, ""),
    "plain": ({"foreach": False}, ""),
    "fused, torch's kernel": ({"fused": True}, "triton"),
    "fused": ({"fused": True}, ""),
}


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        name: In tables.
        build: Makes it from a model, a learning rate and a weight decay.
        rule: Of ours; "" for torch's.
        reads_gradient_twice: Whether a step must know the whole gradient before it can use any of it.
    """

    name: str
    build: Callable[[nn.Module, float, float], Any]
    rule: str = ""

    @property
    def reads_gradient_twice(self) -> bool:
        return self.rule not in ("", "published")


def groups_of(
    model: nn.Module, rule: str, lr: float | Tensor, weight_decay: float, **more: Any
) -> list[dict[str, Any]]:
    """The groups in which a rule trains a model: not every tensor takes every rule."""
    return param_groups(model, lr=lr, weight_decay=weight_decay, update=rule, **more)


def needed(rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """The options without which a rule does not train parameters of a dtype: a mean of them is kept in float32."""
    return {"momentum_dtype": torch.float32} if rules.RULES[rule].averages and dtype != torch.float32 else {}


def sai(rule: str, label: str = "", without: str = "", **options: Any) -> Contender:
    """SGD-SaI.

    Args:
        rule: A key of ``RULES``.
        label: What distinguishes it from the rule by itself.
        without: Kernels whose name begins so are left out.
        **options: Of the optimizer.
    """

    def build(model: nn.Module, lr: float, weight_decay: float) -> SGDSaI:
        groups = groups_of(model, rule, lr, weight_decay)
        all_options = {**needed(rule, next(model.parameters()).dtype), **options}
        optimizer = SGDSaI(groups, lr=lr, weight_decay=weight_decay, update=rule, **all_options)
        if without:
            original = optimizer.step

            def step(*args: Any) -> Any:
                with kernels(without):
                    return original(*args)

            optimizer.step = step  # type: ignore[method-assign]
        return optimizer

    return Contender(f"SGD-SaI {rule}" + (f", {label}" if label else ""), build, rule)


@contextlib.contextmanager
def kernels(without: str = "") -> Iterator[set[str]]:
    """Leave kernels out for a while; gives the names of those that were used, as they are used.

    Args:
        without: The names' beginning; "" leaves out none. What makes factors and means is left out with any.
    """
    before, faster, used = list(KERNELS), [list(of) for of in FASTER], set[str]()

    def watched(kernel: Kernel) -> Kernel:
        def update(*args: Any, **options: Any) -> None:
            used.add(kernel.name)
            kernel.update(*args, **options)

        return dataclasses.replace(kernel, update=update)

    KERNELS[:] = [watched(kernel) for kernel in before if not (without and kernel.name.startswith(without))]
    for of in FASTER if without else ():
        of.clear()
    try:
        yield used
    finally:
        KERNELS[:] = before
        for of, kept in zip(FASTER, faster, strict=True):
            of[:] = kept


class TorchMuon:
    """torch.optim.Muon for the matrices within the layers, fused AdamW for the rest, at one learning rate.

    Args:
        model: A language model.
        lr: AdamW's; Muon's updates are brought to the size of AdamW's.
        weight_decay: Of both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        outer = ("wte", "wpe", "embed", "lm_head")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and not any(word in name for word in outer)]
        inside = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in inside]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True),
        )
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for optimizer in self._optimizers for p, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = param_groups(model, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def _sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = param_groups(model, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)


def _official(model: nn.Module, lr: float, weight_decay: float) -> Any:
    from sgd_sai import SGD_sai  # where wheels.sh has brought it

    return SGD_sai(list(model.parameters()), lr=lr, weight_decay=weight_decay)


#: The authors' own SGD-SaI.
OFFICIAL = Contender("official sgd-sai", _official)

#: torch's own, by name.
RIVALS: dict[str, Contender] = {
    name: Contender(name, build) for name, build in ((ADAMW, _adamw), (SGD, _sgd), (MUON, TorchMuon))
}

"""Makes ``sgd_sai`` and its kin names of timm's optimizers, for ``--opt`` and ``create_optimizer_v2``.

It imports nothing of timm: the names are entered when somebody has imported its registry. They are those of Trainer.
"""

from __future__ import annotations

import contextvars
import functools
from types import ModuleType
from typing import Any

from torch import nn

from hf_sai.imports import when_imported
from hf_sai.optim.rules import RULES
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.trainer.building import OPTIMIZER_NAMES
from hf_sai.trainer.grouping import named_groups

__all__ = ["register"]

# What timm's function and its training script give where nobody says a momentum.
_TIMM_MOMENTUM = 0.9

# timm looks up what follows the last underscore, so that a name comes to its registry without one.
# Its training script never asks an optimizer for the means that update="averaged" evaluates.
_NAMES = {
    name: options for name, options in OPTIMIZER_NAMES.items() if not RULES[options.get("update", "published")].averages
}
_INSIDE = {name: name.replace("_", "") for name in _NAMES}

# timm gives its optimizers groups without names; here is the model that it has made them of.
_MODEL: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("_MODEL", default=None)


def register() -> None:
    """Register our names with timm. Importing ``hf_sai`` does this; again does nothing."""
    when_imported("timm.optim._optim_factory", _enter)


def _enter(factory: ModuleType) -> None:
    registry = factory.default_registry
    original = registry.create_optimizer
    if getattr(original, "_hf_sai", False):
        return
    for name, options in _NAMES.items():
        description = f"SGD-SaI of hf-sai, --opt {name}"
        registry.register(
            factory.OptimInfo(_INSIDE[name], _build, description, has_momentum=True, defaults=dict(options))
        )

    @functools.wraps(original)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name in _NAMES if opt.lower().removeprefix("lookahead_") == name), None)
        if name is None:
            return original(model_or_params, opt, *args, **kwargs)
        own = OPTIMIZER_NAMES[name].get("momentum")
        if own is not None and kwargs.get("momentum", _TIMM_MOMENTUM) not in (own, _TIMM_MOMENTUM):
            raise ValueError(
                f"momentum is {kwargs['momentum']}, but {name} stands for {own}; leave it out, or take sgd_sai with "
                f"--opt-kwargs update={OPTIMIZER_NAMES[name]['update']}, which takes any momentum."
            )
        token = _MODEL.set(model_or_params if isinstance(model_or_params, nn.Module) else None)
        try:
            return original(model_or_params, opt.lower().replace(name, _INSIDE[name]), *args, **kwargs)
        finally:
            _MODEL.reset(token)

    create_optimizer._hf_sai = True  # type: ignore[attr-defined]
    registry.create_optimizer = create_optimizer


def _build(params: Any, **options: Any) -> SGDSaI:
    """The optimizer, with the names and hidden matrices of the model of which timm has made the groups."""
    model = _MODEL.get()
    if model is not None:
        if "lr" not in options:
            raise ValueError("no learning rate: timm's sgd_sai has no default of its own, give lr (--lr).")
        # With a key more than Trainer's two groups have: timm's own exemptions from decay stay.
        groups = [{"name": None, **group} if isinstance(group, dict) else group for group in params]
        update = options["update"] if options.get("update") == "orthogonal" else None
        params = named_groups(model, groups, options["lr"], options["weight_decay"], update=update)
    return SGDSaI(params, **options)

"""Reads which adapter and which role every PEFT parameter has, from PEFT's own structures, never from its name.

peft is looked up in ``sys.modules`` and not imported: a model can hold PEFT layers only where peft was imported
before. The modules are found by walking the model, so a ``PeftModel``, a ``PeftMixedModel`` and a plain transformers
or diffusers model after ``model.add_adapter(...)`` are all read alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Role", "merged_adapters", "peft_roles"]

# PEFT's container name -> the shorter word used here; every other role is called as PEFT calls its container.
_SHORT = {"lora_magnitude_vector": "magnitude", "internal_xlora_classifier": "xlora_classifier"}


class Role(NamedTuple):
    """What one parameter is for: the adapter that owns it, and what it does there (``lora_A``, ``magnitude``, ...)."""

    adapter: str
    role: str


def peft_roles(model: nn.Module) -> dict[int, Role]:
    """Returns the role of every PEFT parameter of ``model``, by ``id(parameter)``; empty where PEFT is not in use.

    Read in this order, the first to name a parameter wins:

    1. tuner layers and training wrappers: the containers listed in their ``adapter_layer_names``, keyed by adapter,
       then their other containers;
    2. LLaMA-Adapter, which swaps whole attention modules instead of keeping containers;
    3. containers keyed by adapter that belong to the model and not to a layer (prompt encoders, shadow backbones);
    4. X-LoRA's classifier.

    Parameters that PEFT only sets free (biases with ``bias="all"``) belong to the base model and are not listed.

    Args:
        model: Any module.

    Example:
        >>> from torch import nn
        >>> peft_roles(nn.Linear(2, 2))
        {}
    """
    peft = _peft()
    roles: dict[int, Role] = {}
    if peft is None:
        return roles
    for adapter, role, parameter in _entries(model, peft):
        roles.setdefault(id(parameter), Role(adapter, _SHORT.get(role, role)))
    return roles


def merged_adapters(model: nn.Module) -> set[str]:
    """Returns the adapters merged into the base weights: their own parameters get no gradient until unmerged."""
    peft = _peft()
    if peft is None:
        return set()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _layer_types(peft))]
    return {adapter for layer in layers for adapter in getattr(layer, "merged_adapters", ())}


def _peft() -> ModuleType | None:
    """peft if it has been imported and has what layers are made of: without that no model can hold one."""
    peft = sys.modules.get("peft")
    try:
        return peft if peft is not None and _layer_types(peft) else None
    except AttributeError:  # its import failed half-way, or something else has that name
        return None


def _layer_types(peft: Any) -> tuple[type, ...]:
    return (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)


def _entries(model: nn.Module, peft: ModuleType) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (adapter, role in PEFT's words, parameter); a parameter reached in several ways comes several times."""
    layer_types = _layer_types(peft)
    for module in model.modules():
        if isinstance(module, layer_types):
            yield from _layer_entries(module)
    adaption_prompt = peft.tuners.adaption_prompt.AdaptionPromptModel
    for module in model.modules():
        if isinstance(module, adaption_prompt):
            yield from _adaption_prompt_entries(module, peft)
    owners = (peft.PeftModel, peft.PeftMixedModel, peft.tuners.tuners_utils.BaseTuner)
    for module in model.modules():
        if isinstance(module, owners):
            yield from _owner_entries(module, peft)


def _layer_entries(layer: Any) -> Iterator[tuple[str, str, Tensor]]:
    frozen: Mapping[str, tuple[str, ...]] = getattr(layer, "frozen_peft_weight_names", {})
    listed = [(path, attrgetter(path)(layer)) for path in getattr(layer, "adapter_layer_names", ())]
    # PEFT 0.17 does not list the containers of its wrappers, nor the magnitudes of a convolution's DoRA.
    unlisted = [(name, m) for name, m in layer.named_children() if isinstance(m, nn.ModuleDict | nn.ParameterDict)]
    for path, container in listed + unlisted:
        # A wrapper reaches into the layer below with a dotted path ("token_adapter.trainable_tokens_delta").
        role = path.rpartition(".")[2]
        for adapter, value in container.items():
            if path not in frozen.get(adapter, ()):
                yield from ((adapter, role, parameter) for parameter in _parameters(value))


def _adaption_prompt_entries(tuner: Any, peft: ModuleType) -> Iterator[tuple[str, str, Tensor]]:
    attention = peft.tuners.adaption_prompt.layer._BaseAdaptedAttention
    in_place = [module for module in tuner.modules() if isinstance(module, attention)]
    for adapter, modules in [(tuner._active_adapter, in_place), *tuner._cached_adapters.items()]:
        for module in modules:
            yield from ((adapter, role, parameter) for role, parameter in module.named_parameters(recurse=False))


def _owner_entries(owner: Any, peft: ModuleType) -> Iterator[tuple[str, str, Tensor]]:
    for role, child in owner.named_children():
        if isinstance(child, nn.ModuleDict | nn.ParameterDict):
            for adapter, value in child.items():
                if adapter in owner.peft_config:
                    yield from ((adapter, role, parameter) for parameter in _parameters(value))
    if isinstance(owner, peft.tuners.xlora.XLoraModel):
        adapter = next(name for name, config in owner.peft_config.items() if isinstance(config, peft.XLoraConfig))
        for parameter in owner.internal_xlora_classifier.parameters():
            yield adapter, "internal_xlora_classifier", parameter


def _parameters(value: nn.Module | Tensor) -> Iterable[Tensor]:
    return value.parameters() if isinstance(value, nn.Module) else (value,)

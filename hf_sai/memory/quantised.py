"""Gives a skeleton the layers of a quantised base: as QLoRA loads it in 4 bits, or as its configuration says it is.

Only the bytes are right: a weight that GPTQ or AWQ packs stays a linear layer's, and says how many bytes it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch import nn

__all__ = ["PACKED", "as_saved", "in_4bit"]

#: What a weight says of itself that is saved packed: (its bytes, scales and zeros included; its kind, "4-bit").
PACKED = "hf_sai_packed"

#: As transformers' BitsAndBytesConfig spells them.
_BITSANDBYTES_KEYS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_skip_modules",
)
_QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def in_4bit(model: Any, name: str) -> Any:
    """Replaces the layers as ``from_pretrained(quantization_config=...)`` does before it loads the weights."""
    return _bitsandbytes(model, name, _QLORA)


def as_saved(model: Any, saved: dict[str, Any], name: str, load_in_4bit: bool) -> Any:
    """Gives the model the layers that its configuration's ``quantization_config`` tells of.

    Args:
        model: A skeleton in full precision.
        saved: That part of the configuration.
        name: The model's, for messages.
        load_in_4bit: Whether the caller asked for 4 bits as well.

    Raises:
        ValueError: A method whose bytes are not known here, or 4 bits asked for on top of another method.
    """
    in_bitsandbytes = saved.get("load_in_4bit") or saved.get("load_in_8bit")
    method = str(saved.get("quant_method") or ("bitsandbytes" if in_bitsandbytes else "unknown")).lower()
    if load_in_4bit and not saved.get("load_in_4bit"):
        raise ValueError(f"{name} is saved quantised by {method}, so it cannot be loaded in 4 bits as well")
    if in_bitsandbytes:
        return _bitsandbytes(model, name, {key: saved[key] for key in _BITSANDBYTES_KEYS if key in saved})
    if method not in ("gptq", "awq"):
        raise ValueError(
            f"{name} is saved quantised by {method}, and what that takes is not known here (known: bitsandbytes, gptq, "
            "awq); name the model that it was made from"
        )
    bits, group = saved.get("bits", saved.get("w_bit", 4)), saved.get("group_size", saved.get("q_group_size", 128))
    for what, value in (("bits", bits), ("group_size", group)):
        if isinstance(value, bool) or not isinstance(value, int) or not (0 < value <= 2**20 or value == -1):
            raise ValueError(f"the quantization_config of {name} gives {what} as {value!r}, which is no whole number")
    model.requires_grad_(False)
    for layer in _linear_layers(model, saved.get("modules_to_not_convert") or _kept_whole(model)):
        groups = 1 if group == -1 else math.ceil(layer.in_features / group)
        # Packed codes; a float16 scale and packed zero for each group of a column; with GPTQ each input's group.
        codes = layer.in_features * layer.out_features * bits / 8
        scales = groups * layer.out_features * (2 + bits / 8)
        index = 4 * layer.in_features if method == "gptq" else 0
        setattr(layer.weight, PACKED, (math.ceil(codes + scales) + index, f"{bits}-bit"))
    return model


def _linear_layers(model: nn.Module, skipped: list[str]) -> Iterator[nn.Linear]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in skipped):
            yield module


def _kept_whole(model: Any) -> list[str]:
    """The modules that transformers leaves in full precision: the output layer and what is tied to the embedding."""
    from transformers import integrations
    from transformers.quantizers import base

    home: Any = base if hasattr(base, "get_keys_to_not_convert") else integrations  # transformers 5, 4
    return list(home.get_keys_to_not_convert(model))


def _bitsandbytes(model: Any, name: str, settings: dict[str, Any]) -> Any:
    if find_spec("bitsandbytes") is None:  # transformers fails with a NameError
        raise ImportError(f'the layers of {name} in 4 or 8 bits need bitsandbytes: pip install "hf-sai[quant]"')
    import transformers
    from transformers import integrations

    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"load_in_4bit is for transformers models, and {name} is a {type(model).__name__}")
    config = transformers.BitsAndBytesConfig(**settings)
    model.requires_grad_(False)
    skipped = settings.get("llm_int8_skip_modules") or _kept_whole(model)
    return integrations.replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=config)

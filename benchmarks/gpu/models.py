"""The models that are trained and stepped: random weights in the shapes of GPT-2 and Llama 2, on the device."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from hf_sai.memory.skeletons import KNOWN_SIZES

__all__ = ["causal_lm", "layers_that_fit", "with_gradients"]

transformers.logging.set_verbosity_error()  # its hints are for texts that are generated

_LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
#: What a rehearsal makes of a size.
_TINY: dict[str, dict[str, int]] = {
    "gpt2": {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def causal_lm(
    name: str,
    device: torch.device,
    *,
    tiny: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """A language model with its architecture's random weights.

    Args:
        name: A key of ``KNOWN_SIZES``.
        device: Where it is made.
        tiny: In a rehearsal's size.
        layers: As many as this instead of the published number.
        dtype: Of the weights.
        **settings: Of the configuration.
    """
    config = _config(name, tiny, layers, settings)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def layers_that_fit(name: str, bytes_per_element: int, free: int, *, tiny: bool = False) -> int:
    """So many layers of a model leave room for what is needed beside each parameter.

    Args:
        name: A key of ``KNOWN_SIZES``.
        bytes_per_element: Of parameters, gradients, states and temporary tensors together.
        free: Bytes.
        tiny: In a rehearsal's size, of which all layers fit.

    Raises:
        ValueError: Not even one layer fits.
    """
    if tiny:
        return _TINY[KNOWN_SIZES[name]["model_type"]][_LAYERS[KNOWN_SIZES[name]["model_type"]]]
    with torch.device("meta"):
        one, two = (
            sum(
                p.numel()
                for p in transformers.AutoModelForCausalLM.from_config(_config(name, False, n, {})).parameters()
            )
            for n in (1, 2)
        )
    most = 1 + (free // bytes_per_element - one) // (two - one)
    if most < 1:
        raise ValueError(f"one layer of {name} needs {one * bytes_per_element:,} bytes, and {free:,} are free.")
    return min(most, KNOWN_SIZES[name][_LAYERS[KNOWN_SIZES[name]["model_type"]]])


def with_gradients(model: nn.Module) -> nn.Module:
    """The model, each parameter with a random gradient of a common part and noise."""
    for p in model.parameters():
        p.grad = 1e-3 * (1 + torch.randn_like(p))
    return model


def _config(name: str, tiny: bool, layers: int | None, settings: dict[str, Any]) -> Any:
    known = dict(KNOWN_SIZES[name])
    kind = known["model_type"]
    if tiny:
        known |= _TINY[kind]
    if layers is not None:
        known[_LAYERS[kind]] = layers
    if kind == "gpt2":
        known |= {**_NO_DROPOUT, "bos_token_id": None, "eos_token_id": None}
    return transformers.AutoConfig.for_model(**{**known, "use_cache": False, **settings})

"""Train adapters on a model's last layers only, with what the layers below compute for a row looked up, not repeated.

Layers below the first adapter never change, so that their output for a row of tokens is the same in every step of
every run. Remembering it makes a step on a CPU several times cheaper and changes no loss.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["with_frozen_prefix"]


def with_frozen_prefix(model: PreTrainedModel, layers: int, pad_token_id: int) -> PreTrainedModel:
    """Return the model's last layers and its head, reading the output of the layers below from memory.

    Args:
        model: A Llama-like causal language model; it is left as it is.
        layers: How many decoder layers the result has, at the top of the model.
        pad_token_id: Token with which rows are filled up at the right.

    Returns:
        A model with the same loss for the same `input_ids`, whose deep copies share the memory.

    Raises:
        ValueError: `layers` is not between 1 and the number of layers of the model.
    """
    total = len(model.model.layers)
    if not 0 < layers <= total:
        raise ValueError(f"layers is {layers}; the model has {total}, so it must lie between 1 and {total}.")
    prefix = copy.deepcopy(model.model).requires_grad_(False).eval()
    prefix.layers = prefix.layers[: total - layers]
    prefix.norm = nn.Identity()  # the last layers' own input is not normalised
    top = copy.deepcopy(model)
    top.model.layers = top.model.layers[total - layers :]
    top.config.num_hidden_layers = layers
    top.config.use_cache = False  # the remaining layers still count from where they stood
    top.model.embed_tokens = _RememberedPrefix(prefix, pad_token_id)
    return top


class _RememberedPrefix(nn.Module):
    """Stands where the token embedding was, and returns the prefix's output for each row."""

    def __init__(self, prefix: nn.Module, pad_token_id: int) -> None:
        super().__init__()
        self._compute = [prefix]  # in a list, so that its weights do not count as this model's
        self._pad = pad_token_id
        self._rows: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _RememberedPrefix:
        return self

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return hidden states (batch, length, width) for tokens (batch, length); zeros where a row is filled up."""
        rows = [self._row(tokens) for tokens in input_ids]
        output = rows[0].new_zeros(*input_ids.shape, rows[0].shape[-1])
        for index, row in enumerate(rows):
            output[index, : len(row)] = row
        return output

    def _row(self, tokens: Tensor) -> Tensor:
        # A row may end in a real token that is also used to fill up: the last token's output is never needed.
        length = int((tokens != self._pad).nonzero().max()) + 1
        key = tokens[:length].cpu().numpy().tobytes()
        if key not in self._rows:
            self._rows[key] = self._compute[0](tokens[None, :length], use_cache=False).last_hidden_state[0]
        return self._rows[key]

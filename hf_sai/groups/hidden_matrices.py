"""Reads from a model's structure which of its tensors are hidden matrices, and which of their dimensions are outputs.

A hidden matrix takes features to features: a weight of ``nn.Linear``, of GPT-2's ``Conv1D``, of a convolution or of a
stack of experts, within the layers that a model stacks. An embedding has a row for each token and a head one for each
class, of which most see nothing in a step; so has a router for each expert. What looks at sounds or colours has no
features before it. Positions, norms and biases are no matrices at all, nor is what has one row or one column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_sai.groups.peft_roles import peft_roles
from hf_sai.optim.layout import whole_shapes

__all__ = ["hidden_matrices"]

_Weight = tuple[str, nn.Parameter, str | None]  # the path of its module, itself and its form

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Parts of a module's path by which it is none of the layers between. What a layer calls heads, or q_head, is attention.
_OUTSIDE = re.compile(r"embed|(?:^|_)(?:heads?|classifier|score|b?box_predictor)$")
_OUTSIDE_IN_A_LAYER = re.compile(r"embed|^(?:(?![qkv]_).*_)?(?:head|classifier|score|router)$|^shared_expert_gate$")

# Layers that are stacked further down: a tower below an embedding or a head has hidden matrices of its own.
_STACKED_BELOW = re.compile(r"[^.]*[^.\d][^.]*(?:\.[^.]*[^.\d][^.]*)*\.\d+\..")

# Most channels of what is no feature yet: a sound's, or a picture's colours.
_RAW_CHANNELS = 3


def hidden_matrices(model: nn.Module, chosen: Mapping[str, bool] | None = None) -> dict[int, str]:
    """Returns the form of every hidden matrix of ``model`` (a key of ``FORMS``), by ``id(parameter)``.

    Layers are what lies in an ``nn.ModuleList``, and beside it in an ``nn.Sequential`` of modules that have such lists.
    A list of single weights that ends the model is its heads, if it has other layers. Models without lists have their
    layers in ``nn.Sequential``. What is in no list is left out if it is the model's first or last weight. Adapters'
    parameters are not listed.

    Args:
        model: Any module.
        chosen: Regular expression -> whether the parameters in whose names it is found are hidden matrices. The last
            that is found decides.

    Raises:
        ValueError: An expression is wrong, is found in no name, or makes a matrix of a vector or of an adapter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        >>> hidden_matrices(model) == {id(model[1].weight): "linear"}
        True
    """
    adapters = set(peft_roles(model))
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    outside = adapters | {id(p) for module in embeddings for p in module.parameters()}
    outside |= {id(p) for module in model.modules() for p in (*_output_embeddings(module), *_router(module))}
    weights = list(_weights(model))
    hidden = {
        id(p): form
        for path, p, form in _in_layers(model, weights)
        if form is not None and id(p) not in outside and not _is_outside(path.lower())
    }
    forms = {id(p): form for _, p, form in weights if form is not None}
    return _corrected(model, hidden, forms, chosen or {}, adapters)


def _in_layers(model: nn.Module, weights: Sequence[_Weight]) -> Iterator[_Weight]:
    """Those of the weights that lie where a model stacks its layers."""
    lists, sequences = (
        [_around(model, path, kind) for path, _, _ in weights] for kind in (nn.ModuleList, nn.Sequential)
    )
    inner = range(1, len(weights) - 1)
    in_sequences = [index for index in inner if sequences[index]]
    of_blocks = {
        sequence
        for above, within in zip(sequences, lists, strict=True)
        for sequence in above
        if any(sequence == "" or found.startswith(f"{sequence}.") for found in within)
    }
    chosen = {index for index, within in enumerate(lists) if within}
    chosen |= {index for index in in_sequences if of_blocks.intersection(sequences[index])}
    if heads := _heads(weights, lists):
        whole_model = len(heads) == len(weights)
        chosen = chosen - heads or set(in_sequences) or (heads.intersection(inner) if whole_model else heads)
    return (weights[index] for index in sorted(chosen or in_sequences))


def _heads(weights: Sequence[_Weight], lists: Sequence[Sequence[str]]) -> set[int]:
    """The numbers of the single weights in a list that ends the model; none if it ends otherwise."""
    if not weights or not lists[-1]:
        return set()
    [*around, own] = lists[-1]
    heads = {index for index, within in enumerate(lists) if own in within}
    single = all(weights[index][0].rpartition(".")[0] == own for index in heads)
    return heads if single and not around else set()


def _around(model: nn.Module, path: str, kind: type[nn.Module]) -> list[str]:
    """The paths of the modules of a kind that a module or parameter lies in, the outermost first."""
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts)))
    return [prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), kind)]


def _is_outside(path: str) -> bool:
    """Whether a part of a module's path says that it embeds, sends on or gives out, and no layers are stacked below."""
    parts = path.split(".")
    in_a_layer = False
    for place, part in enumerate(parts, start=1):
        words = _OUTSIDE_IN_A_LAYER if in_a_layer else _OUTSIDE
        if words.search(part) and not _STACKED_BELOW.match(".".join(parts[place:])):
            return True
        in_a_layer |= part.isdigit()
    return False


def _corrected(
    model: nn.Module, hidden: dict[int, str], forms: dict[int, str], chosen: Mapping[str, bool], adapters: set[int]
) -> dict[int, str]:
    """What was found, but where the user says otherwise."""
    if not isinstance(chosen, Mapping) or not all(type(flag) is bool for flag in chosen.values()):
        raise ValueError(
            f"matrices must map expressions to True or False, such as {{'router': False}}, but is {chosen!r}."
        )
    named = dict(model.named_parameters())
    shapes = dict(zip(named, whole_shapes(named.values()), strict=True))
    for expression, is_hidden in chosen.items():
        try:
            meant = [name for name in named if re.search(expression, name)]
        except (re.error, TypeError) as error:
            raise ValueError(f"matrices names {expression!r}, which is no regular expression ({error}).") from None
        if not meant:
            raise ValueError(f"matrices names {expression!r}, which is found in no parameter's name.")
        for name in meant:
            key, dims = id(named[name]), len(shapes[name])
            if not is_hidden:
                hidden.pop(key, None)
            elif dims < 2 or key in adapters:
                what = "of an adapter" if key in adapters else f"of shape {tuple(shapes[name])}"
                raise ValueError(f"matrices makes a hidden matrix of {name}, which is {what}; name hidden layers only.")
            else:
                hidden.setdefault(key, forms.get(key) or _form_of_another(model, name, dims))
    return hidden


def _form_of_another(model: nn.Module, name: str, dims: int) -> str:
    """The form of a parameter that would not have been taken for a hidden matrix."""
    if dims == 2:
        return "linear"
    return "convolution" if dims > 3 or _around(model, name, _ConvNd) else "experts"


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """The weights that may be hidden matrices and, without a form, others by which a model may begin or end."""
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        shapes = dict(zip(own, whole_shapes(own.values()), strict=True))
        for name, parameter in own.items():
            form = _form(module, path, name, shapes)
            if form is not None or (name == "weight" and isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS))):
                yield path, parameter, form


def _form(module: nn.Module, path: str, name: str, shapes: Mapping[str, Sequence[int]]) -> str | None:
    kind, shape = type(module).__name__, shapes[name]
    if len(shape) > 1 and min(shape[0], math.prod(shape[1:])) == 1:
        return None
    if name == "weight" and isinstance(module, nn.Linear):
        return "linear"
    if name == "weight" and kind == "Conv1D" and len(shape) == 2:  # transformers'
        return "linear_transposed"
    if name == "weight" and isinstance(module, _CONVOLUTIONS):
        mixes = module.groups == 1  # a depthwise one mixes no channels
        return "convolution" if mixes and module.in_channels > _RAW_CHANNELS else None
    if name == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return "linear"
    if len(shape) == 3 and "expert" in f"{path}.{kind}".lower():
        return "experts_transposed" if _is_transposed(module, shapes) else "experts"
    return None


def _is_transposed(experts: nn.Module, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a stack's matrices lie with an output in each column: as it says, or as its two products fit together."""
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    up, down = (shapes.get(name, (0, 0, 0)) for name in ("gate_up_proj", "down_proj"))
    return up[1] == down[2] and up[2] != down[1]


def _output_embeddings(module: nn.Module) -> Iterator[nn.Parameter]:
    """What transformers says turns a model's features into tokens."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _router(module: nn.Module) -> Iterator[nn.Parameter]:
    """What sends tokens to the experts beside it, where it is called as what gates something else elsewhere."""
    gate = getattr(module, "gate", None) if hasattr(module, "experts") else None
    if isinstance(gate, nn.Module):
        yield from gate.parameters()

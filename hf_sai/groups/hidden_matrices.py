"""Reads from a model's structure which of its tensors are hidden matrices, and which of their dimensions are outputs.

A hidden matrix takes features to features: a weight of ``nn.Linear``, of GPT-2's ``Conv1D``, of a convolution or of a
stack of experts, within the layers that a model stacks. An embedding has a row for each token and a head one for each
class, of which most see nothing in a step; so has a router for each expert. What looks at sounds or colours has no
features before it. Positions, norms and biases are no matrices at all, nor is what has one row or one column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from hf_sai.groups.peft_roles import peft_roles
from hf_sai.optim.layout import whole_shapes

__all__ = ["hidden_matrices"]

_Candidate = tuple[str, nn.Parameter, str]  # the path of its module, itself and its form

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Parts of a module's path by which it is none of the layers between. What a layer calls a head is its attention's.
_OUTSIDE = re.compile(r"embed|(?:^|_)(?:heads?|classifier|score|predictor)$")
_OUTSIDE_IN_A_LAYER = re.compile(r"embed|^(?:(?:lm_)?head|classifier|score|shared_expert_gate)$|(?:^|_)router$")

# Layers that are stacked further down: a tower below an embedding or a predictor has hidden matrices of its own.
_STACKED_BELOW = re.compile(r"[^.]*[^.\d][^.]*(?:\.[^.]*[^.\d][^.]*)*\.\d+\..")

# Most channels of what is no feature yet: a sound's, or a picture's colours.
_RAW_CHANNELS = 3


def hidden_matrices(model: nn.Module, chosen: Mapping[str, bool] | None = None) -> dict[int, str]:
    """Returns the form of every hidden matrix of ``model`` (a key of ``FORMS``), by ``id(parameter)``.

    Layers are what lies in an ``nn.ModuleList``, and what is made of modules and repeated in an ``nn.Sequential``.
    Where these are weights alone, or none, the weights in ``nn.Sequential`` are taken, or else those in the lists, but
    for the model's first and last. Adapters' parameters are not listed.

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
    candidates = list(_candidates(model))
    hidden = {
        id(p): form
        for path, p, form in _in_layers(model, candidates)
        if id(p) not in outside and not _is_outside(path.lower())
    }
    return _corrected(model, hidden, {id(p): form for _, p, form in candidates}, chosen or {}, adapters)


def _in_layers(model: nn.Module, candidates: list[_Candidate]) -> list[_Candidate]:
    """Those of the candidates that lie where a model stacks its layers."""
    above = {path: list(_above(model, path)) for path, _, _ in candidates}
    listed = [entry for entry in candidates if any(_is_layer(*pair) for pair in above[entry[0]])]
    if any(_is_layer(*pair) for path, _, _ in listed for pair in above[path][:-1]):
        return listed
    inner = candidates[1:-1]
    in_sequences = [e for e in inner if any(isinstance(module, nn.Sequential) for module, _ in above[e[0]])]
    return in_sequences or [entry for entry in inner if entry in listed]


def _above(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules that a module lies in, the outermost first, each with that child of it which leads there."""
    for name in path.split(".") if path else ():
        child = model.get_submodule(name)
        yield model, child
        model = child


def _is_layer(above: nn.Module, child: nn.Module) -> bool:
    """Whether a module's child is a layer of it: any in a list, in a sequence what is made of modules and repeated."""
    if isinstance(above, nn.Sequential):
        return _is_made_of_modules(child) and sum(type(other) is type(child) for other in above) > 1
    return isinstance(above, nn.ModuleList)


def _is_made_of_modules(module: nn.Module) -> bool:
    """Whether a module has modules below; a plain sequence, which may be a weight and what follows, not by itself."""
    children = list(module.children())
    return any(map(_is_made_of_modules, children)) if type(module) is nn.Sequential else bool(children)


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
    forms = {id(m.weight): "convolution" for m in model.modules() if isinstance(m, _CONVOLUTIONS)} | forms
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
                hidden.setdefault(key, forms.get(key, {2: "linear", 3: "experts"}.get(dims, "convolution")))
    return hidden


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """The weights that may be hidden matrices, with the path of their module and their form."""
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        shapes = dict(zip(own, whole_shapes(own.values()), strict=True))
        for name, parameter in own.items():
            form = _form(module, path, name, shapes)
            if form is not None:
                yield path, parameter, form


def _form(module: nn.Module, path: str, name: str, shapes: Mapping[str, Sequence[int]]) -> str | None:
    kind, shape = type(module).__name__, shapes[name]
    if name == "weight" and isinstance(module, nn.Linear):
        return "linear" if min(shape) > 1 else None
    if name == "weight" and kind == "Conv1D" and len(shape) == 2:  # transformers'
        return "linear_transposed" if min(shape) > 1 else None
    if name == "weight" and isinstance(module, _CONVOLUTIONS):
        mixes = module.groups == 1  # a depthwise one mixes no channels
        return "convolution" if mixes and module.in_channels > _RAW_CHANNELS and module.out_channels > 1 else None
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

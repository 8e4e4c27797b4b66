"""Reads from a model's structure which of its tensors are hidden matrices, and which of their dimensions are outputs.

A hidden matrix takes features to features: a weight of ``nn.Linear``, of GPT-2's ``Conv1D``, of a convolution or of a
stack of experts, within the layers that a model stacks. An embedding has a row for each token and a head one for each
class, of which most see nothing in a step; so has a router for each expert. Positions, norms and biases are no matrices
at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from hf_sai.groups.peft_roles import peft_roles
from hf_sai.optim.layout import whole_shapes

__all__ = ["hidden_matrices"]

# Words in a module's path by which it is none of the layers between, wherever it stands.
_NOT_BETWEEN = re.compile(r"embed|(?:^|[._])(?:heads?|classifier|score)(?:[._]|$)")


def hidden_matrices(model: nn.Module, chosen: Mapping[str, bool] | None = None) -> dict[int, str]:
    """Returns the form of every hidden matrix of ``model`` (a key of ``FORMS``), by ``id(parameter)``.

    Layers are looked for in ``nn.ModuleList`` and, of models that have no weights there, in ``nn.Sequential``, of which
    the model's first and last weight are left out. Adapters' parameters are not listed.

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
    listed = [entry for entry in candidates if _within(model, entry[0], nn.ModuleList)]
    if not listed:
        listed = [entry for entry in candidates[1:-1] if _within(model, entry[0], nn.Sequential)]
    hidden = {id(p): form for path, p, form in listed if id(p) not in outside and not _NOT_BETWEEN.search(path.lower())}
    return _corrected(model, hidden, {id(p): form for _, p, form in candidates}, chosen or {}, adapters)


def _corrected(
    model: nn.Module, hidden: dict[int, str], forms: dict[int, str], chosen: Mapping[str, bool], adapters: set[int]
) -> dict[int, str]:
    """What was found, but where the user says otherwise."""
    named = dict(model.named_parameters())
    shapes = dict(zip(named, whole_shapes(named.values()), strict=True))
    for expression, is_hidden in chosen.items():
        try:
            meant = [name for name in named if re.search(expression, name)]
        except re.error as error:
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
                hidden.setdefault(key, forms.get(key, "linear" if dims == 2 else "convolution"))
    return hidden


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """The weights that may be hidden matrices, with the path of their module and their form."""
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        shapes = dict(zip(own, whole_shapes(own.values()), strict=True))
        for name, parameter in own.items():
            form = _form(module, path, name, len(shapes[name]))
            if form is not None:
                yield path, parameter, form


def _form(module: nn.Module, path: str, name: str, dims: int) -> str | None:
    kind = type(module).__name__
    if name == "weight" and isinstance(module, nn.Linear):
        return "linear"
    if name == "weight" and kind == "Conv1D" and dims == 2:  # transformers'
        return "linear_transposed"
    # A depthwise convolution mixes no channels.
    if name == "weight" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "convolution"
    if name == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return "linear"
    if dims == 3 and "expert" in f"{path}.{kind}".lower():
        return "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
    return None


def _output_embeddings(module: nn.Module) -> Iterator[nn.Parameter]:
    """What transformers says turns a model's features into tokens."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _router(module: nn.Module) -> Iterator[nn.Parameter]:
    """What sends tokens to the experts beside it."""
    for name in ("gate", "router"):
        router = getattr(module, name, None) if hasattr(module, "experts") else None
        if isinstance(router, nn.Module):
            yield from router.parameters()


def _within(model: nn.Module, path: str, kind: type[nn.Module]) -> bool:
    """Whether a module lies in one of this kind."""
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), kind) for end in range(len(parts)))

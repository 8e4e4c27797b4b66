"""Sorts a model's trainable parameters into named optimizer groups: one per adapter and role, one per kind of decay."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_sai.groups.hidden_matrices import hidden_matrices
from hf_sai.groups.peft_roles import Role, merged_adapters, peft_roles
from hf_sai.optim.layout import look_at, whole_shapes
from hf_sai.optim.options import DEFAULTS
from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["create_sgd_sai_optimizer", "no_decay_names", "param_groups"]

logger = logging.getLogger(__name__)

BASE = "base"

# The names transformers' Trainer keeps from decaying (``Trainer.get_decay_parameter_names``).
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

# Adapter roles that multiply activations or weights and start at something other than zero: decay would switch the
# layer off instead of pulling the adapter back to doing nothing. Their tensors may have more than one dimension.
_SCALE_ROLES = frozenset({"magnitude", "ia3_l", "boft_s"})


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor,
    weight_decay: float,
    lr_ratios: Mapping[str, float] | None = None,
    freeze: Sequence[str] = (),
    adapters: Sequence[str] = (),
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
    update: str | None = None,
    matrices: Mapping[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """Returns optimizer groups in which every trainable parameter of ``model`` is in exactly one.

    Adapter parameters are grouped by adapter and role as PEFT itself keeps them (``default/lora_A``,
    ``default/lora_B``, ``default/magnitude``, ``default/modules_to_save``, ...). Where a role holds both kinds, its
    parameters without weight decay form a group of their own (``default/lora_B/no_decay``). Everything else is
    ``base/decay`` or ``base/no_decay``. These two are also the fallback: a trainable parameter PEFT's structures do
    not name (biases set free by ``bias="all"``, layers a user unfroze, a module PEFT does not know) lands there.
    Shared parameters count once.

    Each group has ``params`` (as (name, parameter), so that the optimizer's groups hold ``param_names``), ``name``,
    ``role``, ``lr``, ``weight_decay``, and in adapter groups ``normalize_over``: the adapter, over which
    ``SGDSaI(normalize=True)`` takes the largest g-SNR, so that adapters do not scale one another.

    Args:
        model: A ``PeftModel``, a transformers or diffusers model with adapters added, or any other module.
        lr: Learning rate of every role without a ratio; a float or a one-element tensor (each group gets its own).
        weight_decay: Decoupled weight decay of the parameters that decay.
        lr_ratios: Role -> factor on ``lr``, as in LoRA+: ``{"lora_B": 16}``. A key ``"adapter/role"`` is for one
            adapter and goes before the role alone; ``"base"`` is for both base groups. Default: 1 for all.
        freeze: Roles (or ``"adapter/role"``) not to train, such as ``("lora_A",)``. They get no group and
            ``requires_grad_(False)``: left out alone they would still cost a gradient and count in the gradient norm
            that clipping looks at. PEFT's ``set_adapter`` sets the flag again; without a group they still never move.
        adapters: Adapters that get groups although another one is active now and these are frozen. For training that
            switches with ``set_adapter``, name all of them here; parameters without a gradient are skipped in a step.
            The other way is ``optimizer.add_param_group`` for each group of a later call, after the first switch.
        no_decay: Called with (name, parameter), True for a parameter that must not decay. Default: what
            ``no_decay_names`` lists.
        update: The rule, written into every group. With ``"orthogonal"`` hidden matrices have groups of their own
            (``base/linear``, ``base/linear_transposed``, ``base/convolution``, ``base/experts``; their key
            ``matrices`` says what ``SGDSaI`` must know of them), and everything else, adapters too, takes
            ``"factored"``. Default: no key, so that the optimizer's own option holds.
        matrices: Regular expression -> whether the parameters in whose names it is found are hidden matrices; the last
            that is found decides. Default: what :func:`hf_sai.groups.hidden_matrices.hidden_matrices` reads from the
            model.

    Returns:
        The groups, in the order in which the model names their first parameters; none is empty.

    Raises:
        ValueError: No trainable parameter; a role or adapter the model does not have; a ratio that is not a positive
            number; an adapter that is merged into the base weights and therefore cannot train; ``matrices`` without
            ``update="orthogonal"``, or with an expression that fits nothing.

    Example:
        >>> from torch import nn
        >>> groups = param_groups(nn.Linear(3, 2), lr=0.01, weight_decay=0.1)
        >>> [(g["name"], g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
        [('base/decay', 0.1, ['weight']), ('base/no_decay', 0.0, ['bias'])]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"groups are read from the model itself (a torch.nn.Module), but this is a {type(model).__name__}."
        )
    look_at(model)
    roles = peft_roles(model)
    _require_known("freeze", freeze, {key for p in model.parameters() for key in _keys(roles.get(id(p)))})
    known_adapters = {role.adapter for role in roles.values()}
    _require_known("adapters", adapters, known_adapters)

    named: list[tuple[str, nn.Parameter, Role | None]] = []
    to_freeze: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        role = roles.get(id(parameter))
        if not (parameter.requires_grad or (role is not None and role.adapter in adapters)):
            continue
        if any(key in freeze for key in _keys(role)):
            to_freeze.append(parameter)
        else:
            named.append((name, parameter, role))
    _require_trainable(model, named, freeze)

    ratios = dict(lr_ratios or {})
    _require_known("lr_ratios", ratios, {key for _, _, role in named for key in _keys(role)})
    for key, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            hint = f'; to keep a role from training use freeze=("{key}",)' if ratio == 0 else ""
            raise ValueError(f"lr_ratios[{key!r}] is {ratio!r}: a ratio must be a finite number above 0{hint}")

    if no_decay is None:
        names = no_decay_names(model)

        def no_decay(name: str, _: nn.Parameter) -> bool:
            return name in names

    groups = _assemble(named, no_decay, _hidden(model, named, update, matrices), lr, weight_decay, ratios)
    for group in groups if update is not None else ():
        group["update"] = "factored" if update == "orthogonal" and "matrices" not in group else update
    # Last, so that a refused call leaves the model as it was.
    for parameter in to_freeze:
        parameter.requires_grad_(False)
    return groups


def create_sgd_sai_optimizer(
    model: nn.Module,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    lr_ratios: Mapping[str, float] | None = None,
    freeze: Sequence[str] = (),
    adapters: Sequence[str] = (),
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
    update: str = DEFAULTS["update"],
    matrices: Mapping[str, bool] | None = None,
    **sai_options: Any,
) -> SGDSaI:
    """Returns an ``SGDSaI`` over ``param_groups(model, ...)``, in the shape of PEFT's ``create_loraplus_optimizer``.

    Args:
        model: As for ``param_groups``, and so are all arguments but the last.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, 0 unless asked for, as PEFT's own optimizers have it.
        lr_ratios: Role -> factor on ``lr``.
        freeze: Roles not to train.
        adapters: Inactive adapters to hold groups for.
        no_decay: The rule for weight decay.
        update: The update rule.
        matrices: Which tensors are hidden matrices, where ``update="orthogonal"`` should not read it from the model.
        **sai_options: Passed on to ``SGDSaI``: ``momentum``, ``eps``, ``normalize``, ...

    Returns:
        The optimizer; give it to ``Trainer(optimizers=(optimizer, None))`` or step it yourself.

    Raises:
        ValueError: As ``param_groups`` and ``SGDSaI`` do.

    Example:
        >>> from torch import nn
        >>> optimizer = create_sgd_sai_optimizer(nn.Linear(3, 2), lr=0.01, momentum=0.8)
        >>> [(group["name"], group["momentum"]) for group in optimizer.param_groups]
        [('base/decay', 0.8), ('base/no_decay', 0.8)]
    """
    groups = param_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        lr_ratios=lr_ratios,
        freeze=freeze,
        adapters=adapters,
        no_decay=no_decay,
        update=update,
        matrices=matrices,
    )
    return SGDSaI(groups, lr=lr, weight_decay=weight_decay, update=update, **sai_options)


def no_decay_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that do not decay by default, whether they are trainable or not.

    In the base model: what transformers' Trainer exempts (biases, normalisation layers, by name and for
    ``nn.LayerNorm`` by type), the vectors of any other module whose class is called a norm, and one-element tensors.
    In an adapter: every vector (biases, DoRA magnitudes, gates, scales), one-element tensors, and the scales of IA3,
    BOFT and convolutional DoRA, which are stored as matrices.

    Args:
        model: Any module.

    Example:
        >>> from torch import nn
        >>> sorted(no_decay_names(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))))
        ['0.bias', '1.bias', '1.weight']
    """
    # DeepSpeed ZeRO-3 and FSDP1 leave other shapes in the model than its parameters have.
    parameters = list(model.parameters())
    shapes = dict(zip(map(id, parameters), whole_shapes(parameters), strict=True))
    roles = peft_roles(model)
    of_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or len(shapes[id(parameter)]) <= 1
    }

    def exempt(name: str, parameter: nn.Parameter) -> bool:
        if shapes[id(parameter)].numel() == 1 or id(parameter) in of_norms:
            return True
        role = roles.get(id(parameter))
        if role is None:
            return _NO_DECAY_NAME.search(name.lower()) is not None
        # Not by name: an adapter may be called "bias".
        return len(shapes[id(parameter)]) <= 1 or role.role in _SCALE_ROLES

    return {name for name, parameter in model.named_parameters() if exempt(name, parameter)}


def _assemble(
    named: Sequence[tuple[str, nn.Parameter, Role | None]],
    no_decay: Callable[[str, nn.Parameter], bool],
    hidden: Mapping[int, str],
    lr: float | Tensor,
    weight_decay: float,
    ratios: Mapping[str, float],
) -> list[dict[str, Any]]:
    split: dict[tuple[Role | None, str | None], dict[bool, list[tuple[str, nn.Parameter]]]] = {}
    for name, parameter, role in named:
        kinds = split.setdefault((role, hidden.get(id(parameter))), {})
        kinds.setdefault(not no_decay(name, parameter), []).append((name, parameter))

    groups = []
    for (role, form), kinds in split.items():
        ratio = next((ratios[key] for key in _keys(role) if key in ratios), 1.0)
        for decays, params in sorted(kinds.items(), reverse=True):
            group = {
                "params": params,
                "name": _group_name(role, form, decays, alone=len(kinds) == 1),
                "role": BASE if role is None else role.role,
                # Schedulers write into a tensor lr in place, so that no two groups may share one.
                "lr": lr.detach().clone() * ratio if isinstance(lr, Tensor) else lr * ratio,
                "weight_decay": weight_decay if decays else 0.0,
            }
            if role is not None:
                group["normalize_over"] = role.adapter
            if form is not None:
                group["matrices"] = form
            groups.append(group)
    return groups


def _hidden(
    model: nn.Module,
    named: Sequence[tuple[str, nn.Parameter, Role | None]],
    update: str | None,
    matrices: Mapping[str, bool] | None,
) -> dict[int, str]:
    """The forms of the hidden matrices, if the rule is one that makes a difference of them."""
    if update != "orthogonal":
        if matrices:
            raise ValueError(f"matrices is for update='orthogonal', but update is {update!r}; leave it out.")
        return {}
    hidden = hidden_matrices(model, matrices)
    if not any(id(parameter) in hidden for _, parameter, _ in named):
        logger.warning(
            "update='orthogonal': %s trains no hidden matrix, so all its tensors take update='factored'. Name some by "
            "matrices={'expression': True} (Trainer: --optim_args matrices=expression:true), or ask for "
            "update='factored'.",
            type(model).__name__,
        )
    return hidden


def _group_name(role: Role | None, form: str | None, decays: bool, alone: bool) -> str:
    if role is None and form is None:
        return f"{BASE}/decay" if decays else f"{BASE}/no_decay"
    if role is None:
        return f"{BASE}/{form}" if decays else f"{BASE}/{form}/no_decay"
    name = "/".join(role)
    return name if decays or alone else f"{name}/no_decay"


def _keys(role: Role | None) -> tuple[str, ...]:
    """The keys by which ``lr_ratios`` and ``freeze`` may speak of a role, the more particular first."""
    return (BASE,) if role is None else ("/".join(role), role.role)


def _require_known(argument: str, given: Sequence[str] | Mapping[str, Any], known: set[str]) -> None:
    if isinstance(given, str):
        raise ValueError(f"{argument} is the string {given!r}: give a sequence of names, such as ({given!r},)")
    unknown = [key for key in given if key not in known]
    if unknown:
        found = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{argument} names {', '.join(map(repr, unknown))}; this model has: {found}")


def _require_trainable(
    model: nn.Module, named: Sequence[tuple[str, nn.Parameter, Role | None]], freeze: Sequence[str]
) -> None:
    if not named:
        total = sum(1 for _ in model.parameters())
        why = f" and freeze={tuple(freeze)!r}" if freeze else ""
        raise ValueError(
            f"nothing to train: {type(model).__name__} has {total} parameters{why}, none of them left with "
            "requires_grad. Add an adapter (peft.get_peft_model or model.add_adapter), or call "
            "model.requires_grad_(True) to train the model itself; after merge_and_unload() there is no adapter left"
        )
    merged = merged_adapters(model) & {role.adapter for _, _, role in named if role is not None}
    if merged:
        raise ValueError(
            f"adapter {', '.join(sorted(merged))} is merged into the base weights, so its own parameters get no "
            "gradient; call model.unmerge_adapter() before training, or train another adapter"
        )

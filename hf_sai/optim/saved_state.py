"""Saved states: of this class, of its older versions, of the official code; nothing that does not fit is used.

torch's own loading casts every float of the state to its parameter's dtype, so tensors go round it: they are taken out
of the dict once all load hooks have run, and put back in the form in which the optimizer keeps them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_sai.optim.layout import UNMEASURED, Part, kind_of, local, whole_shapes
from hf_sai.optim.momentum import BLOCK_KEY, MOMENTUM_KEYS, convert
from hf_sai.optim.options import OPTIONS, check_options, upgrade_group
from hf_sai.optim.rules import RULES
from hf_sai.optim.rules.averaged import WEIGHT_SUM
from hf_sai.optim.rules.orthogonal import form_of

__all__ = ["SHAPE_KEY", "Incoming", "completed", "read"]

logger = logging.getLogger(__name__)

#: In a state dict, of a whole parameter whose state has no tensor of its shape: none at all, or codes of 4 bits, which
#: are flat. A tensor of this shape and one dimension more, of length 0: it has no bytes, and
#: torch.distributed.checkpoint compares shapes by itself.
SHAPE_KEY = "shape"

_OURS = frozenset(
    {"gsnr", *MOMENTUM_KEYS, BLOCK_KEY, SHAPE_KEY, *chain.from_iterable(rule.keys for rule in RULES.values())}
)
_TENSORS = _OURS - {"gsnr", "averaged_steps", WEIGHT_SUM, BLOCK_KEY}

#: What a group may have beside its options, and its type.
_COUNTS = {"rounding_step": int, "means_shown": bool}

_FRESH = (
    "To train on with the saved weights and a fresh state, load the weights alone (Trainer: give the checkpoint as the "
    "model, or remove optimizer.pt and scheduler.pt from it)."
)

# What wrappers put into parameters' names, which says nothing about the parameter.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

#: The tensors of a state and the parameter they are for, with its group as it is saved.
Incoming = list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]]


def completed(p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A whole parameter's state as a state dict holds it, so that it says of which shape it is."""
    is_flat = isinstance(state.get("gsnr"), list)
    if "gsnr" not in state or is_flat or any(getattr(v, "shape", None) == p.shape for v in state.values()):
        return state
    return {**state, SHAPE_KEY: torch.empty((*p.shape, 0), device=p.device)}


def read(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], *, flat: bool = False
) -> tuple[dict[str, Any], Incoming]:
    """Check a state dict, all of whose load hooks have run, and part it into what torch loads and what it must not.

    Where saved and present parameters have the same names in another order, the state goes by the names; else, as
    always in torch, by place. Options that were saved with the groups win, and a warning names those that differ.

    Args:
        state_dict: As ``Optimizer.state_dict()`` gives it.
        groups: The optimizer's parameter groups as they are.
        flat: Whether their tensors are many parameters each, which have a list of g-SNRs.

    Returns:
        The state dict without tensors, and these; every one has been brought into its form.

    Raises:
        ValueError: It was written by another optimizer, or for other parameters.
    """
    try:
        return _checked(state_dict, groups, flat)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"The state is damaged, or none that an optimizer saves ({told}). {_FRESH}") from error


def _checked(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], flat: bool
) -> tuple[dict[str, Any], Incoming]:
    saved_groups = _in_present_order(state_dict["param_groups"], groups)
    if any("momentum" not in group or "eps" not in group for group in saved_groups):
        keys = ", ".join(sorted(map(str, saved_groups[0].keys() - {"params", "param_names"})))
        raise ValueError(f"The state was written by another optimizer (its options: {keys}). {_FRESH}")
    states = {key: _with_float_gsnr(value) for key, value in state_dict["state"].items()}
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        counts = [[len(group["params"]) for group in of] for of in (saved_groups, groups)]
        raise ValueError(
            f"The state was saved for parameter groups of {counts[0]} parameters, and this optimizer's have "
            f"{counts[1]}. Build model and groups as they were{_of_the_same_update(saved_groups, groups)}. {_FRESH}"
        )
    # What a group says of its tensors is of the present model, if a state of another rule does not say it.
    saved_groups = [
        {**{key: value for key, value in present.items() if key == "matrices"}, **upgrade_group(group, present)}
        for group, present in zip(saved_groups, groups, strict=True)
    ]
    for group, present in zip(saved_groups, groups, strict=True):
        _require_options(group, present["params"])
    _warn_of_other_options(saved_groups, groups)
    states, saved_groups = _by_name(states, saved_groups, groups)
    incoming: Incoming = []
    for index, name, p, group in _each(saved_groups, groups):
        state = states.get(index, {})
        if not isinstance(state, dict):
            raise _damaged(name, "the state")
        if not state:
            continue
        _require_ours(name, state)
        if isinstance(state.get("gsnr"), list) and not flat:
            raise _damaged(name, "gsnr")
        steps = state.get("averaged_steps", 0)
        if not isinstance(steps, Tensor) and not (type(steps) is int and 0 <= steps < 2**63):
            raise _damaged(name, "averaged_steps")
        weight_sum = state.get(WEIGHT_SUM, 0.0)
        if type(weight_sum) is not float or not 0.0 <= weight_sum < math.inf:
            raise _damaged(name, WEIGHT_SUM)
        # Of keys that it did not save, torch.distributed.checkpoint's flat form makes empty dicts.
        state = {key: value for key, value in state.items() if key != BLOCK_KEY and not isinstance(value, dict)}
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if wrong := _TENSORS & (state.keys() - tensors.keys()):
            raise _damaged(name, min(wrong))
        states[index] = {key: value for key, value in state.items() if key not in tensors}
        incoming.append((p, group, _in_form(name, p, group, tensors, counted="averaged_steps" in state)))
    return {**state_dict, "state": states, "param_groups": saved_groups}, incoming


def _of_the_same_update(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> str:
    """Words for who asked for another rule than the saved one, which may have groups of its own."""
    saved, asked = ({str(group.get("update", "published")) for group in of} for of in (saved_groups, groups))
    if saved == asked:
        return ", with the same option matrices" if "orthogonal" in saved else ""
    # Who asks for orthogonal gets factored groups beside it.
    names = ["orthogonal" if "orthogonal" in of else "/".join(sorted(of)) for of in (saved, asked)]
    return f": with update={names[0]}, and not {names[1]}"


def _each(
    saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, str, Tensor, dict[str, Any]]]:
    for saved, group in zip(saved_groups, groups, strict=True):
        names = group.get("param_names") or saved.get("param_names") or []
        for place, (index, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            yield index, names[place] if place < len(names) else f"number {index}", p, saved


def _with_float_gsnr(state: Any) -> Any:
    """A parameter's saved state with numbers that FSDP1 saves as tensors; a flat tensor's g-SNR is ZeRO's list."""
    if not isinstance(state, dict) or "gsnr" not in state or isinstance(state["gsnr"], list):
        return state
    gsnr = float(state["gsnr"])
    steps = {key: int(state[key]) for key in ("averaged_steps",) if isinstance(state.get(key), Tensor)}
    return {**state, "gsnr": gsnr if math.isfinite(gsnr) else UNMEASURED, **steps}


def _require_ours(name: str, state: dict[str, Any]) -> None:
    foreign = state.keys() - _OURS
    if "gsnr" not in state and (foreign or any(isinstance(v, Tensor) and v.numel() for v in state.values())):
        keys = ", ".join(sorted(map(str, state)))
        raise ValueError(
            f"The state was written by another optimizer: parameter {name} has {keys}, and no g-SNR. {_FRESH}"
        )


def _in_present_order(saved_groups: list[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups in the order of the present ones, where both have groups of the same names."""
    saved, present = (
        [frozenset(map(str, group.get("param_names") or ())) for group in of] for of in (saved_groups, groups)
    )
    by_names = dict(zip(saved, saved_groups, strict=True))
    alike = by_names.keys() == set(present) and len(by_names) == len(saved) == len(present)
    return [by_names[names] for names in present] if alike and all(present) else saved_groups


def _by_name(
    states: dict[Any, Any], saved_groups: list[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The states in the present parameters' order, where both sides have names."""
    both = [_names(saved_groups), _names(groups)]
    saved, present = both
    if saved is None or present is None or saved == present:
        return states, saved_groups
    if sorted(saved) == sorted(present) and len(set(saved)) == len(saved):
        indices = list(chain.from_iterable(group["params"] for group in saved_groups))
        index_of = dict(zip(saved, indices, strict=True))
        _require_the_same_rules(saved_groups, groups)
        moved = {
            new: states[index_of[name]] for new, name in zip(indices, present, strict=True) if index_of[name] in states
        }
        return moved, [
            {**group, "param_names": list(own["param_names"])} for group, own in zip(saved_groups, groups, strict=True)
        ]
    different = [pair for pair in zip(saved, present, strict=True) if not _same_name(*pair)]
    if different:
        old, new = different[0]
        more = f" ({len(different)} of {len(saved)} differ)" if len(different) > 1 else ""
        raise ValueError(
            f"The state was saved for parameter {old} where this optimizer has {new}{more}. Build the model as it was, "
            "or, if only names have changed, rename param_names in a hook (register_load_state_dict_pre_hook). "
            f"{_FRESH}"
        )
    return states, saved_groups


def _require_the_same_rules(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a parameter's state would come into a group of another rule: groups keep their options."""
    rules = [(str(group["update"]), form_of(group)) for group in saved_groups]
    was, now = (
        {name: rule for rule, group in zip(rules, of, strict=True) for name in group["param_names"]}
        for of in (saved_groups, groups)
    )
    for name, (update, form) in was.items():
        if now[name] != (update, form):
            raise ValueError(
                f"The state was saved with {_said(update, form)} for parameter {name}, which is in a group with "
                f"{_said(*now[name])} now. Build the groups as they were, with the same option matrices. {_FRESH}"
            )


def _said(update: str, form: str | None) -> str:
    return f"update={update}" + (f", matrices={form}" if form else "")


def _names(groups: Sequence[dict[str, Any]]) -> list[str] | None:
    """The names of all parameters; None where some group has none, or has those of more parameters than tensors."""
    if any(len(group.get("param_names") or ()) != len(group["params"]) for group in groups):
        return None
    return [str(name) for group in groups for name in group.get("param_names") or ()]


def _same_name(one: str, other: str) -> bool:
    """Whether two names differ by what wrappers add, or by a prefix, at most."""
    for part in _WRAPPERS:
        one, other = one.replace(part, ""), other.replace(part, "")
    longer, shorter = sorted((one, other), key=len, reverse=True)
    return longer == shorter or longer.endswith(f".{shorter}")


def _in_form(
    name: str, p: Tensor, group: dict[str, Any], tensors: dict[str, Tensor], *, counted: bool
) -> dict[str, Tensor]:
    """A parameter's saved tensors on its device and in the form its group keeps them.

    With ``counted`` the state says how many steps its running means are of, so that all of these must be there.
    """
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_complex():
            raise _damaged(name, key)
    part = kind_of(p)(p, group, {})
    (part.shape,) = whole_shapes([p])
    if SHAPE_KEY in tensors and tensors[SHAPE_KEY].shape != (*part.shape, 0):
        raise _does_not_fit(name, "state", tensors[SHAPE_KEY].shape[:-1], part)
    tensors = {key: value for key, value in tensors.items() if key != SHAPE_KEY}
    momentum = {key: tensors[key] for key in MOMENTUM_KEYS if key in tensors}
    # Copied: no two optimizers may share running means. Of a momentum that fits torch keeps the tensor it was given.
    formed = {key: value.to(p.device, copy=True) for key, value in tensors.items() if key not in momentum}
    rule = RULES[group["update"]]
    formed = rule.taken_up(part, formed)
    for key, dims in rule.kept(part).items():
        if key in formed:
            if not part.fits(local(formed[key]).shape, dims):
                raise _does_not_fit(name, key, formed[key].shape, part)
            formed[key] = formed[key].to(torch.float32)
        elif counted and not part.fits(part.param.shape, ()):  # a value of each element stands for all of them
            raise _damaged(name, key)
    if "momentum_buffer" in momentum:
        converted = convert(momentum, part)
        if converted is None and part.parted and "momentum_scales" in momentum:
            raise ValueError(
                f"The saved momentum of parameter {name} is in blocks of the whole parameter, of which "
                f"{tuple(part.param.shape)} lie here. Save it sharded, for which fully_shard on one device will do: "
                f"then it is saved as values, which can be sharded anew. {_FRESH}"
            )
        if converted is None:
            raise _does_not_fit(name, "momentum_buffer", momentum["momentum_buffer"].shape, part)
        formed |= converted
    return formed


def _require_options(group: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Raise ValueError for an option that is missing, or that nobody could have asked for with these parameters."""
    for name, option in OPTIONS.items():
        if not option.per_group:
            continue
        if name not in group:
            raise ValueError(f"The state is damaged: the option {name} is missing. {_FRESH}")
    for key, kind in _COUNTS.items():
        if key in group and not (type(group[key]) is kind and group[key] >= 0):
            raise ValueError(f"The state is damaged: {key} of a group cannot be used. {_FRESH}")
    try:
        check_options(group)
        RULES[group["update"]].check({**group, "params": params}, whole_shapes(params))
    except ValueError as error:
        raise ValueError(f"The saved options cannot be used: {error} {_FRESH}") from None


def _damaged(name: str, key: str) -> ValueError:
    return ValueError(f"The state is damaged: {key} of parameter {name} is missing, or cannot be used. {_FRESH}")


def _does_not_fit(name: str, key: str, shape: Sequence[int], part: Part) -> ValueError:
    return ValueError(
        f"The saved {key} of parameter {name} has shape {tuple(shape)}, and the parameter has {tuple(part.shape)}"
        f"{'' if tuple(part.param.shape) == tuple(part.shape) else f', of which {tuple(part.param.shape)} lie here'}: "
        f"the state is another model's. {_FRESH}"
    )


def _warn_of_other_options(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """One warning for all options that were asked for and that the saved ones overrule."""
    different: dict[str, str] = {}
    for saved, present in zip(saved_groups, groups, strict=True):
        for name, option in OPTIONS.items():
            # The rate as it was asked for, which schedulers keep beside the one they have come to.
            key = "initial_lr" if name == "lr" else name
            if option.per_group and key in saved and key in present and not _equal(saved[key], present[key]):
                different.setdefault(name, f"{name}={saved[key]} (asked for: {present[key]})")
    if different:
        logger.warning(
            "Options that were saved with the optimizer's state are in force, as always in torch: %s. To change them, "
            "set them in optimizer.param_groups after loading, or start a fresh state.",
            ", ".join(different.values()),
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return bool(float(one) == float(other))
    return one is other or one == other

"""Names and PEFT roles for parameter groups that Trainer, a subclass of it or its caller has computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_sai.groups.param_groups import param_groups

__all__ = ["named_groups"]

# What of a group is made anew here.
_OURS = ("params", "param_names", "name", "role")


def named_groups(
    model: nn.Module,
    groups: Iterable[Any],
    lr: Any,
    weight_decay: float,
    lr_ratios: Mapping[str, float] | None = None,
    freeze: Sequence[str] = (),
    update: str | None = None,
    matrices: Mapping[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """Part groups by adapter and role and name them; what decays and a group's own rate stay as they came.

    One thing is added where the groups are those that Trainer makes by itself: what :func:`param_groups` exempts from
    decay beyond Trainer's rule (vectors of adapters, scales, one-element tensors, norms of any kind).

    Args:
        model: Where names and roles are from.
        groups: Parameters, (name, parameter) pairs, or dicts of them, as torch's optimizers take.
        lr: Learning rate of the groups that have none.
        weight_decay: Likewise.
        lr_ratios: As for :func:`param_groups`, on top of a group's own rate.
        freeze: As for :func:`param_groups`.
        update: Likewise.
        matrices: Likewise.

    Returns:
        Groups with names that are all different. A parameter that the model does not have (of a loss with weights)
        is called by its number.
    """
    given = _as_dicts(groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    rules: dict[str, Any] = {"lr_ratios": lr_ratios, "freeze": freeze, "update": update, "matrices": matrices}
    standard = param_groups(model, lr=lr, weight_decay=weight_decay, **rules)
    if _is_trainers_own(model, trained, given, weight_decay):
        return _by_mesh(standard)
    frozen = {id(p) for p in trained if not p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    result: list[dict[str, Any]] = []
    for group in given:
        own = {"lr": group.get("lr", lr), "weight_decay": group.get("weight_decay", weight_decay)}
        kept = {key: value for key, value in group.items() if key not in _OURS}
        members = {id(p): p for p in group["params"] if id(p) not in frozen}
        parts = param_groups(model, **own, **rules, no_decay=lambda name, p: False)
        for part in parts:
            params = [(name, members.pop(id(p))) for name, p in part["params"] if id(p) in members]
            result.append({**part, **kept, "lr": part["lr"], "params": params})
        rest = [(names.get(key, f"parameter {place}"), p) for place, (key, p) in enumerate(members.items())]
        # Of a parameter that is not the model's nobody knows whether it is a hidden matrix.
        rule = {"update": "factored"} if update == "orthogonal" else {}
        result.append({"name": "base/decay", "role": "base", **rule, **kept, **own, "params": rest})
        for part in result[-len(parts) - 1 :]:
            part["name"] = _name(part["name"], group.get("name"), float(own["weight_decay"]))
    result = [group for group in result if group["params"]]
    _make_unique(result)
    return result


def _as_dicts(groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups as a list of dicts whose ``params`` are tensors alone."""
    listed = list(groups)
    dicts = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    return [{**group, "params": list(_tensors(group["params"]))} for group in dicts]


def _tensors(params: Any) -> Iterable[Tensor]:
    for item in [params] if isinstance(params, Tensor) else params:
        yield item[1] if isinstance(item, tuple) else item


def _is_trainers_own(
    model: nn.Module, trained: Sequence[Tensor], given: Sequence[dict[str, Any]], weight_decay: float
) -> bool:
    """Whether groups are the two that an unchanged Trainer makes of a model's parameters, or these for each mesh."""
    from transformers import Trainer

    if len(given) < 2 or any(group.keys() != {"params", "weight_decay"} for group in given):
        return False
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    own = {id(p): weight_decay if name in decaying else 0.0 for name, p in model.named_parameters()}
    there = {id(p): group["weight_decay"] for group in given for p in group["params"]}
    return there == {id(p): own[id(p)] for p in trained}


def _by_mesh(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in each of which all parameters lie on one device mesh, as Trainer's do under expert parallelism."""
    result: list[dict[str, Any]] = []
    for group in groups:
        of_mesh: dict[Any, list[tuple[str, Tensor]]] = {}
        for name, p in group["params"]:
            of_mesh.setdefault(getattr(p, "device_mesh", None), []).append((name, p))
        result += [{**group, "params": params} for params in of_mesh.values()]
    _make_unique(result)
    return result


def _name(ours: str, theirs: Any, weight_decay: float) -> str:
    if theirs is not None:
        return str(theirs)
    return "base/no_decay" if ours == "base/decay" and weight_decay == 0 else ours


def _make_unique(groups: Sequence[dict[str, Any]]) -> None:
    taken: set[str] = set()
    for group in groups:
        name = group["name"]
        choices = [name]
        if group["weight_decay"] == 0 and not name.endswith("/no_decay"):
            choices.append(f"{name}/no_decay")
        choices += [f"{name} {number}" for number in range(2, len(groups) + 2)]
        group["name"] = next(choice for choice in choices if choice not in taken)
        taken.add(group["name"])

"""Describes models and optimizers in plain values: what they are, their groups, their g-SNR, their scalars."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_sai.optim.rules import RULES
from hf_sai.runs.environment import short_path, versions
from hf_sai.runs.meters import group_names, state_bytes
from hf_sai.runs.record import to_json

__all__ = ["describe_gsnr", "describe_model", "describe_optimizer", "optimizer_line", "optimizer_scalars"]


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, model type, base model, library, adapter settings, and elements in all and trainable."""
    inner: Any = model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model
    described: dict[str, Any] = {
        "class": type(inner).__name__,
        "parameters": sum(p.numel() for p in inner.parameters()),
        "trainable": sum(p.numel() for p in inner.parameters() if p.requires_grad),
        "library": type(inner).__module__.partition(".")[0],
    }
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if isinstance(model_type, str):
        described["type"] = model_type
    base: Any = inner
    peft_config = getattr(inner, "peft_config", None)
    if peft_config:
        adapter = next(iter(peft_config.values()))
        described["adapter"] = {
            key: to_json(value)
            for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
            if (value := getattr(adapter, key, None)) is not None
        }
        described["adapter"]["peft_type"] = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        described["base_model"] = adapter.base_model_name_or_path
        base = getattr(inner, "get_base_model", lambda: inner)()
        described["base_class"] = type(base).__name__
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    base_model = described.get("base_model") or name
    if base_model:
        place = short_path(str(base_model))
        # A folder "runs/base" looks like a repository's name; with "./" nobody takes it for one.
        local = not place.startswith(("/", "~", ".")) and Path(place).is_dir()
        described["base_model"] = f"./{place}" if local else place
    return described


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Class, options, groups with their counts and rates, and the bytes of its state as they are now."""
    kind = type(optimizer)
    options = _options_in_force(optimizer)
    groups, base = [], _number(options.get("lr"))
    for name, group in zip(group_names(optimizer), optimizer.param_groups, strict=True):
        begun_at = _number(group.get("initial_lr", group.get("lr")))
        groups.append(
            {
                "name": name,
                "tensors": len(group["params"]),
                "elements": sum(p.numel() for p in group["params"]),
                "lr": begun_at,
                "lr_ratio": begun_at / base if begun_at is not None and base else None,
                "weight_decay": _number(group.get("weight_decay")),
            }
        )
    return {
        "name": kind.__name__,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "options": to_json(options),
        "groups": to_json(groups),
        "state_bytes": state_bytes(optimizer),
    }


def _options_in_force(optimizer: Any) -> dict[str, Any]:
    """What the groups say, which is what the optimizer goes by: a loaded state changes them and not the defaults.

    Where groups differ it is the default if some group has it, else what most elements have; of the weight decay,
    which is 0 on purpose for some, the largest.
    """
    options = {}
    for key, default in optimizer.defaults.items():
        values: list[tuple[int, Any]] = []
        for group in optimizer.param_groups:
            value = group.get("initial_lr", group.get("lr")) if key == "lr" else group.get(key, default)
            values.append((sum(p.numel() for p in group["params"]), value))
        if key == "params" or not values:
            continue
        if key == "weight_decay":
            options[key] = max((value for _, value in values), default=default)
        elif any(_same(value, default) for _, value in values):
            options[key] = default
        else:
            options[key] = max(values, key=lambda pair: pair[0])[1]
    return options


def _same(one: Any, other: Any) -> bool:
    numbers = all(hasattr(value, "item") or isinstance(value, (int, float)) for value in (one, other))
    return float(one) == float(other) if numbers else bool(one == other)


def optimizer_line(optimizer: Any, **more: Any) -> str:
    """One line that says how to build the optimizer again, and what its g-SNR came to.

    Args:
        optimizer: An ``SGDSaI``.
        **more: Options from elsewhere that belong to it, such as ``max_grad_norm``.

    Example:
        >>> from hf_sai import SGDSaI
        >>> print(optimizer_line(SGDSaI(nn.Linear(2, 2).named_parameters(), lr=0.1)).partition("; ")[2])
        g-SNR measured for 0 of 2 parameters
    """
    described, gsnr = describe_optimizer(optimizer), describe_gsnr(optimizer, None)
    options = {**described["options"], **more}
    ratios = [group for group in described["groups"] if group["lr_ratio"] not in (None, 1.0)]
    if ratios:
        options["lr_ratios"] = {group["name"]: group["lr_ratio"] for group in ratios}
    listed = ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)
    measured = sum(role["measured"] for role in gsnr["roles"])
    medians = [
        f"{role['group']} {role['median_ratio']:.3g}" for role in gsnr["roles"] if role["median_ratio"] is not None
    ]
    text = f"SGDSaI of hf-sai {versions()['hf-sai']} (arXiv 2412.11768) with {listed}"
    text += f"; g-SNR measured for {measured} of {len(gsnr['parameters'])} parameters"
    return text + (f", median g-SNR/sqrt(n) by group: {', '.join(medians)}" if medians else "")


def describe_gsnr(optimizer: Any, model: nn.Module | None) -> dict[str, Any]:
    """g-SNR per parameter and per role; empty for an optimizer that has none."""
    if not hasattr(optimizer, "gsnr_report"):
        return {}
    named = all("param_names" in group for group in optimizer.param_groups)
    report = optimizer.gsnr_report(None if named or model is None else model.named_parameters())
    by_role = defaultdict(list)
    for row in report:
        by_role[row.group].append(row)
    roles = []
    for role, rows in by_role.items():
        values = sorted(row.gsnr for row in rows if row.gsnr is not None)
        ratios = [row.ratio for row in rows if row.ratio is not None]
        roles.append(
            {
                "group": role,
                "tensors": len(rows),
                "measured": len(values),
                "min": values[0] if values else None,
                "median": statistics.median(values) if values else None,
                "max": values[-1] if values else None,
                "median_ratio": statistics.median(ratios) if ratios else None,
            }
        )
    parameters = [
        {"name": row.name, "group": row.group, "shape": list(row.shape), "gsnr": row.gsnr, "ratio": row.ratio}
        for row in report
    ]
    return {"parameters": parameters, "roles": roles}


def optimizer_scalars(optimizer: Any, rates: Sequence[Any] | None = None) -> Iterator[tuple[str, float]]:
    """What a tracker shows of an optimizer: ``sai/gsnr_over_sqrt_n/ROLE``, ``sai/gsnr_unmeasured``, ``sai/lr/ROLE``.

    That is the median of what is measured, the number of parameters without, and the group's learning rate times the
    mean scale of its elements. An optimizer without g-SNR has its groups' rates alone.

    Args:
        optimizer: The optimizer, unwrapped.
        rates: The learning rates of the groups, or of the first of them; default: as they are now.
    """
    names, groups = group_names(optimizer), optimizer.param_groups
    known = list(rates or ())
    rates = [_number(rate) or 0.0 for rate in [*known, *(group["lr"] for group in groups[len(known) :])]]
    if not hasattr(optimizer, "gsnr_report"):
        yield from ((f"sai/lr/{name}", rate) for name, rate in zip(names, rates, strict=True))
        return
    frozen = {
        name
        for group in groups
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
        if not p.requires_grad
    }
    # The report, not the parameters: DeepSpeed ZeRO keeps many of them in one flat tensor.
    rows = [row for row in optimizer.gsnr_report() if row.name not in frozen]
    by_group = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    mine = [by_group[str(group.get("name", index))] for index, group in enumerate(groups)]
    for name, own in zip(names, mine, strict=True):
        if ratios := [row.ratio for row in own if row.ratio is not None]:
            yield f"sai/gsnr_over_sqrt_n/{name}", statistics.median(ratios)
    yield "sai/gsnr_unmeasured", float(sum(not row.measured for row in rows))
    largest: dict[Any, float] = defaultdict(float)
    for group, own in zip(groups, mine, strict=True):
        key = group.get("normalize_over")
        largest[key] = max([largest[key], *(row.gsnr or 0.0 for row in own)])
    for name, rate, group, own in zip(names, rates, groups, mine, strict=True):
        rule = RULES[group["update"]]
        scales = [
            (math.prod(row.shape), rule.scale(row.gsnr, math.prod(row.shape)) if row.gsnr else 0.0) for row in own
        ]
        mean = sum(map(math.prod, scales)) / max(1, sum(elements for elements, _ in scales))
        if group["normalize"]:
            mean /= largest[group.get("normalize_over")] or 1.0
        yield f"sai/lr/{name}", rate * mean


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

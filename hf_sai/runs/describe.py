"""Describes models and optimizers in plain values: what they are, their groups, their g-SNR, their effective rates."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_sai.runs.environment import short_path, versions
from hf_sai.runs.meters import group_names, state_bytes
from hf_sai.runs.record import to_json

__all__ = ["describe_gsnr", "describe_model", "describe_optimizer", "effective_rates", "optimizer_line"]


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
    groups, default = [], _number(optimizer.defaults.get("lr"))
    for name, group in zip(group_names(optimizer), optimizer.param_groups, strict=True):
        begun_at = _number(group.get("initial_lr", group.get("lr")))
        groups.append(
            {
                "name": name,
                "tensors": len(group["params"]),
                "elements": sum(p.numel() for p in group["params"]),
                "lr": begun_at,
                "lr_ratio": begun_at / default if begun_at is not None and default else None,
                "weight_decay": _number(group.get("weight_decay")),
            }
        )
    return {
        "name": kind.__name__,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "options": to_json({key: value for key, value in optimizer.defaults.items() if key != "params"}),
        "groups": to_json(groups),
        "state_bytes": state_bytes(optimizer),
    }


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


def effective_rates(optimizer: Any) -> Iterator[tuple[str, float]]:
    """``sai/lr/ROLE``, each group's rate times the mean scale of its elements, and ``sai/unmeasured``.

    An optimizer without g-SNR has its groups' rates, and no ``sai/unmeasured``.
    """
    names, groups = group_names(optimizer), optimizer.param_groups
    if not hasattr(optimizer, "gsnr_report"):
        yield from ((f"sai/lr/{name}", _number(group["lr"]) or 0.0) for name, group in zip(names, groups, strict=True))
        return
    rows = defaultdict(list)  # the report, not the parameters: DeepSpeed ZeRO keeps many of them in one flat tensor
    for row in optimizer.gsnr_report():
        rows[row.group].append((math.prod(row.shape), row.gsnr or 0.0))
    mine = [rows[str(group.get("name", index))] for index, group in enumerate(groups)]
    largest: dict[Any, float] = defaultdict(float)
    for group, scales in zip(groups, mine, strict=True):
        key = group.get("normalize_over")
        largest[key] = max([largest[key], *(scale for _, scale in scales)])
    for name, group, scales in zip(names, groups, mine, strict=True):
        if group.get("update", "published") != "published":  # the gradient's size is in the step no more
            scales = [(elements, scale / math.sqrt(elements)) for elements, scale in scales]
        mean = sum(map(math.prod, scales)) / max(1, sum(elements for elements, _ in scales))
        if group.get("normalize"):
            mean /= largest[group.get("normalize_over")] or 1.0
        yield f"sai/lr/{name}", (_number(group["lr"]) or 0.0) * mean
    yield "sai/unmeasured", float(sum(not scale for scales in rows.values() for _, scale in scales))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

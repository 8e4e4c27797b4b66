"""Writes tables of groups (what each holds, if it decays, its g-SNR, who is unmeasured) and of the tensors in them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hf_sai.optim.gsnr import GSNRRow
from hf_sai.optim.html_table import html_table
from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["GroupTable", "describe_groups", "group_table", "tensor_table", "unmeasured_rows"]

_HEAD = ("group", "role", "tensors", "elements", "shapes", "decay", "g-SNR", "g-SNR/sqrt(n)")
_SHAPES_SHOWN = 3


class GroupTable(str):
    """The table as text, which a notebook shows as HTML."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def describe_groups(groups: SGDSaI | Sequence[dict[str, Any]]) -> GroupTable:
    """Returns a table of parameter groups, one line each.

    Args:
        groups: An optimizer, whose g-SNR is shown, or what ``param_groups`` returned, before anything is measured.

    Returns:
        The table, as text, which a notebook shows as HTML. After training, a group with unmeasured parameters says
        UNMEASURED, and their names follow below.

    Example:
        >>> from torch import nn
        >>> from hf_sai import param_groups
        >>> print(describe_groups(param_groups(nn.Linear(3, 2), lr=0.01, weight_decay=0.1)))
        group          role  tensors  elements  shapes  decay  g-SNR  g-SNR/sqrt(n)
        base/decay     base  1        6         2x3     yes    -      -
        base/no_decay  base  1        2         2       no     -      -
        total                2        8
    """
    if isinstance(groups, SGDSaI):
        return group_table(groups.param_groups, groups.gsnr_report(), trained=bool(groups.state))
    return group_table(groups, unmeasured_rows(groups), trained=False)


def unmeasured_rows(groups: Sequence[dict[str, Any]]) -> list[GSNRRow]:
    """Returns a row for each parameter of what ``param_groups`` returned."""
    return [
        GSNRRow(name=name, group=group["name"], shape=tuple(parameter.shape), gsnr=None, ratio=None)
        for group in groups
        for name, parameter in group["params"]
    ]


def tensor_table(rows: Iterable[GSNRRow]) -> str:
    """Returns a table of parameters, one line each, in the order of the rows."""
    lines = [("tensor", "group", "shape", "g-SNR")]
    for row in rows:
        gsnr = "-" if row.gsnr is None else f"{row.gsnr:.4g}"
        lines.append((row.name, row.group, _shape(row), gsnr))
    return _aligned(lines)


def group_table(groups: Sequence[dict[str, Any]], rows: Iterable[GSNRRow], *, trained: bool) -> GroupTable:
    """Returns the table of :func:`describe_groups` from the groups' settings and a row for each parameter.

    Args:
        groups: ``name``, ``role`` and ``weight_decay`` of each; a group without a name goes by its number, and groups
            of one name share a line.
        rows: One for each parameter; ``group`` is the name of its group.
        trained: Whether steps were taken, so that a parameter without a g-SNR is missing one.
    """
    by_group: dict[str, list[GSNRRow]] = {}
    settings: dict[str, list[dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        name = str(group.get("name", number))
        by_group.setdefault(name, [])
        settings.setdefault(name, []).append(group)
    for row in rows:
        by_group[row.group].append(row)
    lines = [_HEAD]
    for name, members in by_group.items():
        roles = _distinct(str(group.get("role", "-")) for group in settings[name])
        decay = _distinct("yes" if float(group["weight_decay"]) > 0 else "no" for group in settings[name])
        lines.append((name, roles, *_counts(members), _shapes(members), decay, *_gsnr(members, trained)))
    every = [row for members in by_group.values() for row in members]
    lines.append(("total", "", *_counts(every), "", "", "", ""))

    text = [_aligned(lines)]
    unmeasured = [row.name for row in every if not row.measured] if trained else []
    missing = f"UNMEASURED, no finite non-zero gradient so far, not being trained ({len(unmeasured)}):"
    if unmeasured:
        text += [missing, *(f"  {name}" for name in unmeasured)]
    shown = GroupTable("\n".join(text))
    shown.html = html_table(lines, f"{missing} {', '.join(unmeasured)}" if unmeasured else "")
    return shown


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shape(row: GSNRRow) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _distinct(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _counts(rows: Sequence[GSNRRow]) -> tuple[str, str]:
    return str(len(rows)), f"{sum(math.prod(row.shape) for row in rows):,}"


def _shapes(rows: Sequence[GSNRRow]) -> str:
    counted = Counter(map(_shape, rows)).most_common()
    shown = [shape if times == 1 else f"{shape} ({times})" for shape, times in counted[:_SHAPES_SHOWN]]
    return ", ".join(shown + (["..."] if len(counted) > _SHAPES_SHOWN else []))


def _gsnr(rows: Sequence[GSNRRow], trained: bool) -> tuple[str, str]:
    """The range of the group's g-SNR, and the median of its ratio to that of a gradient without a mean."""
    values = [row.gsnr for row in rows if row.gsnr is not None]
    ratios = [row.ratio for row in rows if row.ratio is not None]
    missing = len(rows) - len(values) if trained else 0
    parts = [f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else f"{values[0]:.4g}"] if values else []
    if missing:
        parts.append(f"{missing} UNMEASURED")
    return ", ".join(parts) or "-", f"{statistics.median(ratios):.3f}" if ratios else "-"

"""Pictures of runs, drawn from their records: loss curves, g-SNR per layer and role, update-to-weight ratios.

Needs matplotlib (``pip install "hf-sai[plots]"``). Every picture has its own light background, so that it reads on
every page. Colours are told apart by people with any of the common colour deficiencies, and each line has its own
dashes and marker besides.
"""

from __future__ import annotations

import io
import logging
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sai.runs.files import atomic_write
from hf_sai.runs.record import RunRecord
from hf_sai.runs.units import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BACKGROUND",
    "COLORS",
    "GRID",
    "TEXT",
    "draw",
    "dress",
    "layer_and_kind",
    "new_figure",
    "plot_gsnr",
    "plot_loss",
    "plot_updates",
    "save_pictures",
]

logger = logging.getLogger(__name__)

BACKGROUND, TEXT, GRID = "#ffffff", "#1f2328", "#d0d7de"
# Found by search: among 6,000 random colours those whose smallest difference (CIELAB, over normal sight and simulated
# protan, deutan and tritan sight) is largest, beside a blue and an orange, at a contrast of 3.2 to the background.
COLORS = ("#0072b2", "#d55e00", "#130637", "#af837b", "#7e0bec", "#540507")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "os^Dv*"
MAX_RUNS = len(_MARKERS)
MAX_KINDS = 36
MAX_LAYERS = 400
MAX_ROLES = 24


def plot_loss(records: Sequence[RunRecord]) -> Figure:
    """Loss of several runs over steps and over time, and evaluation loss over bytes of optimizer state.

    On the left, training loss is the thin line and evaluation loss the markers. In the middle the same over the seconds
    of training, each step taken to last as long as the run's average one; left out where no record has a time. On the
    right each run is a column at the bytes its optimizer keeps: its evaluations from first (faint) to last (strong), so
    that lower left is better.

    Args:
        records: 1 to 6 runs.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: No runs, more than 6, or no loss in any record.
    """
    _check(records)
    if not any(record.curve("loss") or record.curve("eval_loss") for record in records):
        raise ValueError(f"none of the records ({', '.join(r.name for r in records)}) holds a loss to draw")
    seconds = [record.summary()["step_seconds"] for record in records]
    timed = any(seconds)
    figure = new_figure(width=14 if timed else 10)
    over_steps, *over_time, over_bytes = figure.subplots(
        1, 3 if timed else 2, width_ratios=[2, 2, 1] if timed else [2, 1]
    )
    for index, record in enumerate(records):
        style = _style(index)
        marked = {**style, "linestyle": "none", "marker": _MARKERS[index], "markersize": 5}
        train, evaluation = record.curve("loss"), record.curve("eval_loss")
        label = f"{_short(record.name, 28)} ({_short(str(record.optimizer.get('name', '?')), 16)})"
        if train:
            over_steps.plot(*_columns(train), **style, linewidth=1.3, alpha=0.75, label=None if evaluation else label)
        if evaluation:
            joined = {**marked, **style}
            over_steps.plot(*_columns(evaluation), **(marked if train else joined))
            over_steps.plot([], [], **joined, label=label)
        for points, look in ((train, {**style, "alpha": 0.75}), (evaluation, marked)):
            if points and over_time and seconds[index]:
                steps, losses = _columns(points)
                over_time[0].plot([step * seconds[index] for step in steps], losses, **look, linewidth=1.3)
        if record.state_bytes is not None and evaluation:
            _draw_column(over_bytes, record.state_bytes, [loss for _, loss in evaluation], index)
    dress(over_steps, "optimizer step", "loss (line: training, markers: evaluation)")
    for axes in over_time:
        dress(axes, "time in training steps (s)", "")
    dress(over_bytes, "optimizer state (bytes)", "evaluation loss")
    sizes = [record.state_bytes or 0 for record in records]
    over_bytes.set_xlim(0, 1.3 * max(sizes, default=0) or 1)  # room for the last loss, written beside its marker
    over_bytes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    over_bytes.xaxis.set_major_locator(_locator(4))
    _legend(over_steps)
    return figure


def plot_gsnr(record: RunRecord) -> Figure:
    """g-SNR over sqrt(n) of every layer and kind of parameter, as a map.

    1 is a gradient without a mean; higher means that its elements agree. A crossed cell is unmeasured; an empty one
    does not exist. Kinds beyond 36 and layers beyond 400 are left to the record.

    Args:
        record: A run with SGD-SaI.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: The record has no g-SNR.
    """
    _check([record])
    rows = record.gsnr.get("parameters", [])
    if not rows:
        raise ValueError(f"{record.name} was trained with {record.optimizer.get('name')}, which has no g-SNR to draw")
    cells: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for row in rows:
        cells[layer_and_kind(row["name"])[::-1]].append(row.get("ratio"))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))[:MAX_KINDS]
    layers = sorted(dict.fromkeys(layer for _, layer in cells), key=_layer_order)[:MAX_LAYERS]
    table = [[_median(cells.get((kind, layer), ())) for layer in layers] for kind in kinds]

    figure = new_figure(width=min(16, 4 + 0.38 * len(layers)), height=1.6 + 0.3 * len(kinds))
    axes = figure.subplots()
    known = [value for line in table for value in line if math.isfinite(value)]
    colors = axes.pcolormesh(table, cmap="cividis", norm=_log_norm(known), edgecolors=BACKGROUND, linewidth=1.5)
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(layers):
            if (kind, layer) in cells and not math.isfinite(table[y][x]):
                axes.plot(x + 0.5, y + 0.5, marker="x", color=COLORS[1], markersize=7)
    axes.set_yticks([y + 0.5 for y in range(len(kinds))], [_short(kind, 48) for kind in kinds])
    axes.set_xticks([x + 0.5 for x in range(len(layers))], layers, rotation=90 if max(map(len, layers)) > 5 else 0)
    axes.invert_yaxis()
    dress(axes, "layer", "")
    axes.grid(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(colors, ax=axes, pad=0.02)
    bar.set_label("g-SNR / √n", color=TEXT)
    bar.ax.tick_params(colors=TEXT, which="both")
    bar.ax.yaxis.set_major_formatter("{x:.3g}")
    bar.ax.yaxis.set_minor_formatter("{x:.3g}")
    bar.outline.set_edgecolor(GRID)
    return figure


def plot_updates(record: RunRecord) -> Figure:
    """Update-to-weight ratio of each role over steps, on a logarithmic scale.

    Args:
        record: A run whose record has the scalars of :meth:`hf_sai.runs.recorder.RunRecorder.scalars`.

    Returns:
        A matplotlib figure; roles beyond the sixth repeat the colours, those beyond the 24th are left to the record.

    Raises:
        ValueError: The record has no such ratios.
    """
    _check([record])
    prefix = "sai/update_ratio/"
    curves = {key.removeprefix(prefix): record.curve(key) for key in record.keys(prefix)[:MAX_ROLES]}
    curves = {role: [point for point in points if point[1] > 0] for role, points in curves.items()}
    if not any(curves.values()):
        raise ValueError(f"{record.name} has no update-to-weight ratios: it was trained without RunRecordCallback")
    figure = new_figure(width=8)
    axes = figure.subplots()
    for index, (role, points) in enumerate(curves.items()):
        axes.plot(
            *_columns(points),
            **_style(index),
            marker=_MARKERS[index % MAX_RUNS],
            markersize=4,
            label=_short(role),
        )
    axes.set_yscale("log")
    dress(axes, "optimizer step", "norm of update / norm of weights")
    _legend(axes)
    return figure


def draw(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save_pictures(records: Sequence[RunRecord], folder: str | Path) -> list[Path]:
    """Draw all that the records hold: one picture of all losses, and per run its g-SNR and update ratios.

    Args:
        records: The runs; files about single runs are named after them if there are several.
        folder: Where to write ``loss.png``, ``gsnr.png`` and ``updates.png``.

    Returns:
        The files written.

    Raises:
        ValueError: There is nothing to draw in any record, or there are more than 6 of them.
        OSError: A picture cannot be written.
    """
    _check(records)
    jobs: list[tuple[str, Any, Any]] = [("loss", plot_loss, records)]
    for record, suffix in zip(records, _suffixes(records), strict=True):
        jobs += [(f"gsnr{suffix}", plot_gsnr, record), (f"updates{suffix}", plot_updates, record)]
    written, reasons = [], []
    for name, plot, argument in jobs:
        try:
            figure = plot(argument)
        except ValueError as error:
            reasons.append((name, str(error)))
            continue
        written.append(atomic_write(Path(folder) / f"{name}.png", draw(figure)))
    if not written:
        raise ValueError("nothing to draw: " + "; ".join(reason for _, reason in reasons))
    for name, reason in reasons:
        logger.warning("No picture %s.png: %s.", name, reason)
    return written


def _suffixes(records: Sequence[RunRecord]) -> list[str]:
    """What the names of each run's own pictures end with: nothing for a single run, no two alike."""
    if len(records) == 1:
        return [""]
    taken: list[str] = []
    for record in records:
        name = f"-{_file_name(record.name)}"
        choices = [name, *(f"{name}-{number}" for number in range(2, len(records) + 2))]
        taken.append(next(choice for choice in choices if choice not in taken))
    return taken


def layer_and_kind(name: str) -> tuple[str, str]:
    """Split a parameter's name into its layer and its kind.

    The layer is the first number in the name, with the words before it where a model has several stacks
    (``down_blocks.0``); the kind is the rest, without further numbers. The middle of a UNet has no number and is a
    layer all the same.

    Example:
        >>> layer_and_kind("base_model.model.model.layers.12.self_attn.q_proj.lora_A.default.weight")
        ('12', 'self_attn.q_proj.lora_A')
        >>> layer_and_kind("down_blocks.1.attentions.0.proj_in.weight")
        ('down_blocks.1', 'attentions.proj_in.weight')
        >>> layer_and_kind("unet.mid_block.resnets.0.conv1.weight")
        ('mid_block', 'resnets.conv1.weight')
        >>> layer_and_kind("lm_head.weight")
        ('other', 'lm_head.weight')
    """
    words = [word for word in name.split(".") if word not in ("module", "_orig_mod", "_fsdp_wrapped_module")]
    number = next((index for index, word in enumerate(words) if word.isdigit() or word == "mid_block"), None)
    if number is None:
        return "other", ".".join(words)
    kind = ".".join(word for word in words[number + 1 :] if not word.isdigit())
    # An adapter's weights are told by the adapter's role; that each has the name "default.weight" says nothing.
    kind = re.sub(r"(\.lora_\w+|\.lora_magnitude_vector)\..*$", r"\1", kind)
    stack = words[number - 1] if number and words[number] != "mid_block" else ""
    return (
        words[number] if stack in ("h", "layer", "layers", "blocks", "block", "") else f"{stack}.{words[number]}"
    ), kind


def new_figure(width: float, height: float = 4.2) -> Figure:
    """An empty figure, sizes in inches."""
    # The object interface: no global state, and no window system is asked for.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "hf-sai[plots]"') from error

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, x: str, y: str) -> None:
    """Give axes the pictures' colours, a grid and the names ``x`` and ``y``."""
    axes.set_facecolor(BACKGROUND)
    axes.set_xlabel(x, color=TEXT)
    axes.set_ylabel(y, color=TEXT)
    axes.tick_params(colors=TEXT, which="both")
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _legend(axes: Axes) -> None:
    axes.legend(facecolor=BACKGROUND, edgecolor=GRID, labelcolor=TEXT, framealpha=0.9, handlelength=3)


def _draw_column(axes: Axes, size: int, losses: list[float], index: int) -> None:
    color = COLORS[index]
    axes.plot([size] * len(losses), losses, color=color, linewidth=1, alpha=0.4)
    for place, loss in enumerate(losses, start=1):
        strength = 0.25 + 0.75 * place / len(losses)
        axes.plot(size, loss, marker=_MARKERS[index], color=color, alpha=strength, markersize=6, linestyle="none")
    axes.annotate(
        f"{losses[-1]:.3g}",
        (size, losses[-1]),
        (7, 0),
        textcoords="offset points",
        color=TEXT,
        va="center",
    )


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % MAX_RUNS], "linestyle": _DASHES[index % MAX_RUNS]}


def _check(records: Sequence[RunRecord]) -> None:
    if not 1 <= len(records) <= MAX_RUNS:
        raise ValueError(f"{len(records)} runs were given; a picture takes 1 to {MAX_RUNS}")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and value > 0]
    return statistics.median(known) if known else math.nan


def _layer_order(layer: str) -> tuple[bool, str, int]:
    stack, _, number = layer.rpartition(".")
    return (number.isdigit(), stack, int(number[:9]) if number.isdigit() else 0)


def _log_norm(values: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm

    low, high = min(values, default=1.0), max(values, default=1.0)
    return LogNorm(vmin=low / 1.02, vmax=high * 1.02)


def _locator(ticks: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks)


def _short(text: str, limit: int = 40) -> str:
    # matplotlib reads text between dollars as a formula, and a stranger's may be none.
    text = re.sub(r"[\x00-\x1f]", " ", text).replace("$", r"\$")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:60].strip(".") or "run"

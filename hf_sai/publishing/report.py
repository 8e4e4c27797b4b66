"""One HTML page that lays runs side by side; it needs no network and runs no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_sai.publishing import plots
from hf_sai.runs.files import atomic_write, read_text
from hf_sai.runs.record import RunRecord
from hf_sai.runs.units import human_bytes

__all__ = ["render_report", "write_report"]

_TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"
#: Settings that differ between any two runs and explain nothing.
_NO_CAUSE = ("output_dir", "logging_dir", "run_name", "hub_model_id", "report_to")
_NOTHING = "–"  # noqa: RUF001
MAX_IMAGE_BYTES = 8 * 2**20
#: Images, or samples, of a run; a stranger's record may name one file a million times.
MAX_SHOWN = 64
MAX_TEXT = 4000
_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write a report about runs.

    Args:
        run_dirs: 1 to 6 directories with a ``run_record.json``, the run of interest first.
        path: The HTML file.

    Returns:
        The file.

    Raises:
        ValueError: A record cannot be read, or there are too many.
        OSError: The file cannot be written.
    """
    records = [RunRecord.load(run_dir) for run_dir in run_dirs]
    folders = [Path(run_dir).parent if Path(run_dir).suffix == ".json" else Path(run_dir) for run_dir in run_dirs]
    return atomic_write(path, render_report(records, folders))


def render_report(records: Sequence[RunRecord], folders: Sequence[Path] | None = None) -> str:
    """The page as text. Whatever comes from a record is escaped, and the page allows no script and no request.

    Args:
        records: 1 to 6 runs.
        folders: Their directories, to embed the pictures they name; without them none is embedded.

    Returns:
        HTML.

    Raises:
        ValueError: No records, or more than 6.
    """
    from jinja2 import Environment, StrictUndefined

    if not 1 <= len(records) <= plots.MAX_RUNS:
        raise ValueError(f"{len(records)} runs were given; a report takes 1 to {plots.MAX_RUNS}")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = jinja.from_string(read_text(_TEMPLATE, 2**20))
    summaries = [record.summary() for record in records]
    return template.render(
        runs=summaries,
        facts=_facts(records, summaries),
        metrics=_metrics(summaries),
        loss=_both_themes(plots.plot_loss, records),
        memory=_memory(summaries),
        settings=_settings(records),
        details=[_details(record) for record in records],
        samples=_beside(records, "samples", lambda sample, _: _cut(sample["text"])),
        images=_images(records, folders),
        version=metadata.version("hf-sai"),
    )


def _facts(records: Sequence[RunRecord], summaries: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def number(key: str, form: str) -> list[str]:
        return [_NOTHING if run.get(key) is None else format(run[key], form) for run in summaries]

    return [
        ("optimizer", [run["optimizer"] for run in summaries]),
        ("learning rate", number("lr", ".4g")),
        ("steps", number("steps", ",")),
        ("status", [str(record.run.get("status", _NOTHING)) for record in records]),
        ("model", [str(record.model.get("class", _NOTHING)) for record in records]),
        ("trained parameters", [f"{record.model.get('trainable', 0):,}" for record in records]),
        ("seconds per step", number("step_seconds", ".4g")),
        ("of these in the optimizer", number("optimizer_share", ".1%")),
        ("this record cost", [_NOTHING if r.overhead is None else f"{r.overhead:.2%}" for r in records]),
        ("hardware", [_hardware(record) for record in records]),
        ("data", [", ".join(source["name"] for source in record.data) or _NOTHING for record in records]),
    ]


def _hardware(record: RunRecord) -> str:
    names = [str(device.get("name")) for device in record.hardware.get("accelerators", [])]
    return ", ".join(names) or str(record.hardware.get("processor", _NOTHING))


def _metrics(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, bool]]]]:
    rows = []
    for name in dict.fromkeys(name for run in summaries for name in run["metrics"]):
        values = [run["metrics"].get(name) for run in summaries]
        known = [value for value in values if value is not None]
        best = min(known) if "loss" in name or "perplexity" in name else max(known)
        marks = [value == best and len(known) > 1 for value in values]
        texts = [_NOTHING if value is None else f"{value:.4g}" for value in values]
        rows.append((name.replace("_", " "), list(zip(texts, marks, strict=True))))
    return rows


def _memory(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    most = max((run["state_bytes"] or 0 for run in summaries), default=0) or 1
    return [
        {
            "name": run["name"],
            "optimizer": run["optimizer"],
            "bytes": _NOTHING
            if run["state_bytes"] is None
            else f"{run['state_bytes']:,} ({human_bytes(run['state_bytes'])})",
            "width": f"{20 * (run['state_bytes'] or 0) / most:.2f}",
        }
        for run in summaries
    ]


def _settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Of several runs the settings and versions that differ; of one run its settings that are on."""
    tables = [
        {**{f"{key}": value for key, value in record.settings.items() if key not in _NO_CAUSE}}
        | {f"optimizer: {key}": value for key, value in record.optimizer.get("options", {}).items()}
        | {f"version of {key}": value for key, value in record.versions.items()}
        for record in records
    ]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        cells = [table.get(name) for table in tables]
        differs = any(cell != cells[0] for cell in cells)
        if differs or (len(tables) == 1 and cells[0] not in (None, False, "", [], {})):
            rows.append((name, [_NOTHING if cell is None else _cut(str(cell)) for cell in cells]))
    return rows


def _details(record: RunRecord) -> dict[str, Any]:
    roles = {role["group"]: role for role in record.gsnr.get("roles", [])}
    groups = []
    for group in record.optimizer.get("groups", []):
        role = roles.get(group["name"], {})
        measured = f"{role['measured']} of {role['tensors']}" if role else _NOTHING
        numbers = (group.get("lr"), group.get("weight_decay"), role.get("median_ratio"))
        rate, decay, ratio = (_NOTHING if value is None else f"{value:.4g}" for value in numbers)
        counts = (f"{group.get('tensors', 0):,}", f"{group.get('elements', 0):,}")
        groups.append((group["name"], *counts, rate, decay, measured, ratio))
    drawn = (
        ("g-SNR per layer and kind", _both_themes(plots.plot_gsnr, record)),
        ("Update-to-weight ratio", _both_themes(plots.plot_updates, record)),
    )
    return {
        "name": record.name,
        "groups": groups,
        "pictures": [(title, pair) for title, pair in drawn if pair is not None],
        "commands": list(dict.fromkeys(session["command"] for session in record.run.get("sessions", []))),
    }


def _both_themes(plot: Any, shown: Any) -> dict[str, str] | None:
    """A picture for light and for dark pages, in base64; None where there is nothing to draw."""
    try:
        return {theme: base64.b64encode(plots.draw(plot(shown, theme))).decode() for theme in plots.THEMES}
    except ValueError:
        return None


def _beside(records: Sequence[RunRecord], kind: str, show: Any) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What has the same title in several runs, beside each other: [(title, [(run, content)])]."""
    titles: dict[str, list[tuple[str, Any]]] = {}
    for index, record in enumerate(records):
        for item in getattr(record, kind)[:MAX_SHOWN]:
            content = show(item, index)
            if content is not None:
                titles.setdefault(_cut(item["title"]), []).append((record.name, content))
    return list(titles.items())


def _images(records: Sequence[RunRecord], folders: Sequence[Path] | None) -> list[tuple[str, list[tuple[str, Any]]]]:
    if folders is None:
        return []
    return _beside(records, "images", lambda image, index: _embedded(folders[index], image["file"]))


def _embedded(folder: Path, name: str) -> str | None:
    """A PNG of the run in base64; None for what is no PNG, too large, missing, or outside the run's directory."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or path.stat().st_size > MAX_IMAGE_BYTES:
            return None
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    return base64.b64encode(content).decode() if content.startswith(_PNG) else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."

"""Makes docs/gpu.md and its two pictures from what the parts left.

    python -m benchmarks.gpu.report runs/gpu    # takes these results into docs/gpu.json, then writes the page
    python -m benchmarks.gpu.report             # writes the page anew from docs/gpu.json

Without results the page says so in one line. Results of a rehearsal go to no page of the docs, and results of different
cards or versions to no page at all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.contenders import ADAMW, PATHS, SGD
from benchmarks.gpu.part import COMPLETE, ROOT
from hf_sai.publishing.plots import COLORS, TEXT, draw, dress, new_figure
from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table

#: In the order of their worth.
PARTS = ("correctness", "step_times", "peak_memory", "quality", "first_step", "engines")
RUN = "benchmarks/gpu/run.sh"
NOTHING = (
    "Nothing has been measured on a GPU yet: `make gpu` does it, in nine minutes on one H100 "
    "([what it runs](../benchmarks/gpu/run.sh))."
)
#: What must be the same of all parts on one page.
ALIKE = ("card", "python", "torch", "cuda", "triton", "transformers")
HEAD = "<!-- Written by benchmarks/gpu/report.py. -->\n\n# On a GPU\n\n"

Results = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="folder of the parts' JSON files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    options = parser.parse_args(argv)
    kept = options.output / "gpu.json"
    source = kept if options.results is None else options.results
    try:
        results = (_kept(kept) if kept.is_file() else {}) if options.results is None else read(options.results)
        text = page(results)
        pictures = {"gpu_step_times.png": step_times_picture(results), "gpu_quality.png": quality_picture(results)}
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        told = f"{type(error).__name__}: {error}"
        raise SystemExit(f"{source} holds what no part of this version writes ({told}); run its parts again.") from None
    if options.results is not None:
        if options.output.resolve() == ROOT / "docs" and any(part["rehearsal"] for part in results.values()):
            raise SystemExit(f"{options.results} holds a rehearsal, whose numbers mean nothing; name another --output.")
        atomic_write(kept, json.dumps(results, indent=1) + "\n")
    for name, figure in pictures.items():
        if figure is not None:
            atomic_write(options.output / name, draw(figure))
        else:
            (options.output / name).unlink(missing_ok=True)
    atomic_write(options.output / "gpu.md", text)


def read(folder: Path) -> Results:
    """What the parts left, finished or not.

    Raises:
        SystemExit: There is nothing, a file is damaged, or the parts did not run on the same card and versions.
    """
    results: Results = {}
    for name in PARTS:
        path = folder / f"{name}.json"
        if path.is_file():
            results[name] = _kept(path)
            if results[name].get("part") != name:
                raise SystemExit(f"{path} was not written by the part {name}; take it away, or run the part again.")
    if not results:
        raise SystemExit(f"{folder} holds none of {', '.join(f'{name}.json' for name in PARTS)}; run {RUN} {folder}.")
    machines = {name: [part["environment"][key] for key in ALIKE] for name, part in results.items()}
    first = next(iter(machines))
    for name, machine in machines.items():
        for key, here, there in zip(ALIKE, machine, machines[first], strict=True):
            if here != there:
                raise SystemExit(
                    f"{folder} mixes two machines: {key} of {first}.json is {there}, of {name}.json {here}; "
                    "run both parts on one, or take one file away."
                )
    return results


def _kept(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path} is no JSON ({error}); take it away, or run its part again.") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path} is no JSON of a part; take it away, or run its part again.")
    return found


def page(results: Results) -> str:
    """The page's text."""
    if not results:
        return f"{HEAD}{NOTHING}\n"
    sections = [_begin(results), _bars(results)]
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "correctness": _correctness,
        "step_times": _step_times,
        "peak_memory": _peak_memory,
        "quality": _quality,
        "first_step": _first_step,
        "engines": _engines,
    }
    sections += [makers[name](results[name]["results"]) for name in PARTS if name in results]
    sections.append(_left_out(results))
    return HEAD + "\n\n".join(section for section in sections if section) + "\n"


def _begin(results: Results) -> str:
    first = next(iter(results.values()))
    machine = first["environment"]
    versions = [
        f"{name} {machine[name]}"
        for name in ("python", "torch", "cuda", "triton", "transformers", "numba", "bitsandbytes")
    ]
    dates = sorted({part["environment"]["date"] for part in results.values()})
    warning = "**A rehearsal on a CPU: no number here means anything.**\n\n" if first["rehearsal"] else ""
    rows = []
    for name in PARTS:
        part = results.get(name, {"status": "not run", "seconds": 0})
        rows.append([name, _cell(part["status"]), f"{part['seconds']:.0f}"])
    return (
        f"{warning}{machine['card']}, {' and '.join(dates)}; {', '.join(versions)}.\n\n```bash\n{RUN} runs/gpu\n"
        f"python -m benchmarks.gpu.report runs/gpu\n```\n\n{markdown_table(['part', 'came to', 'seconds'], rows)}"
    )


# --- bars


def _bars(results: Results) -> str:
    rows = []
    model = _of_model(results, "gpt2-xl")
    steps = model.get("rows", [])
    sgd = next((row["ratio"]["median"] for row in steps if row["optimizer"] == SGD), None)
    for what, rule, most, over in (
        ("published step / fused AdamW's", "published", 0.75, 1.0),
        ("published step / fused SGD's with momentum", "published", 1.1, sgd),
        ("factored step / fused AdamW's", "factored", 1.0, 1.0),
    ):
        rows.append([what, f"{most:g}", *_judged(steps, rule, most, over)])
    whole = results.get("quality", {}).get("results", {}).get("whole_steps", {}).get("rows", [])
    ratio = next((row["ratio"] for row in whole if row["optimizer"] == "SGD-SaI orthogonal"), None)
    passed = "not measured" if ratio is None else "yes" if ratio <= 1.05 else "no"
    shown = "not measured" if ratio is None else f"{ratio:.3f}"
    rows.append(["orthogonal, whole training step / AdamW's", "1.05", shown, "", passed])
    table = markdown_table(["bar", "at most", "by default", "fastest path", "passed"], rows)
    many = f"{model.get('parameters', 1.5e9) / 1e9:.1f}"
    return f"## Bars\n\nSteps with {many} billion float32 parameters; the training step with GPT-2 small.\n\n{table}"


def _judged(steps: list[dict[str, Any]], rule: str, most: float, over: float | None) -> list[str]:
    """(by default, on the fastest path of full precision, whether it passed)."""
    base = f"SGD-SaI {rule}"
    names = {base: "default", **{f"{base}, {path}": path for path in PATHS}}
    found = {names[row["optimizer"]]: row["ratio"]["median"] for row in steps if row["optimizer"] in names}
    if "default" not in found or over is None:
        return ["not measured", "", "not measured"]
    found = {path: ratio / over for path, ratio in found.items()}
    fastest = min(found, key=lambda path: found[path])
    passed = "yes" if found["default"] <= most else f"only with {fastest}" if found[fastest] <= most else "no"
    return [f"{found['default']:.2f}", f"{found[fastest]:.2f} ({fastest})", passed]


def _of_model(results: Results, name: str) -> dict[str, Any]:
    models = results.get("step_times", {}).get("results", {}).get("models", [])
    return next((model for model in models if model["model"] == name), {})


# --- parts


def _correctness(found: dict[str, Any]) -> str:
    cases = found.get("cases", [])
    outcomes = [case["outcome"] for case in cases]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "not run"))
    text = (
        f"## Correctness\n\nEvery rule and path against the tests' reference in float64: {counts}. "
        "1 is the most that a case may be off."
    )
    rows = [
        [
            case["case"],
            case["outcome"],
            _cell(case["reason"]) if "reason" in case else f"off by {case['off']:.2g}",
        ]
        for case in cases
        if case["outcome"] != "passed"
    ]
    return text + (f"\n\n{markdown_table(['case', 'outcome', 'why'], rows)}" if rows else "")


def _step_times(found: dict[str, Any]) -> str:
    text = ["## Time of a step"]
    bandwidth = found.get("copy_bytes_per_second")
    if bandwidth:
        text.append(
            f"A copy moves {bandwidth / 1e12:.2f} TB/s, counting bytes read and written. The limit is the bytes that a "
            "step must move at that rate. Optimizers step the same parameters in turn; medians, with quartiles."
        )
    columns = ["optimizer", "time / fused AdamW's", "quartiles", "ms", "limit, ms", "state, bytes/parameter",
               "temporary, GB", "kernels"]  # fmt: skip
    for model in found.get("models", []):
        text.append(
            f"### {model['model']}, {model['layers']} layers, {model['dtype']}: {model['parameters']:,} parameters in "
            f"{model['tensors']} tensors"
        )
        rows = [
            [
                row["optimizer"],
                f"{row['ratio']['median']:.2f}",
                f"{row['ratio']['lower_quartile']:.2f} to {row['ratio']['upper_quartile']:.2f}",
                f"{1e3 * row['median_seconds']:.2f}",
                f"{1e3 * row['limit_seconds']:.2f}",
                f"{row['state_bytes_per_parameter']:.2f}",
                f"{row['temporary_bytes'] / 1e9:.2f}",
                ", ".join(row["kernels"]),
            ]
            for row in sorted(model["rows"], key=lambda row: row["ratio"]["median"])
        ]
        if "baseline" in model:
            base = model["baseline"]
            rows.append([ADAMW, "1", "", f"{1e3 * base['median_seconds']:.2f}", f"{1e3 * base['limit_seconds']:.2f}",
                         f"{base['state_bytes_per_parameter']:.2f}", "", "torch's operations"])  # fmt: skip
        text.append(markdown_table(columns, rows))
    if any(model["rows"] for model in found.get("models", [])):
        text.append("![Step times over fused AdamW's](gpu_step_times.png)")
    return "\n\n".join(text)


def _peak_memory(found: dict[str, Any]) -> str:
    if not found.get("rows"):
        return ""
    columns = ["optimizer", "weights", "gradients", "states", "peak", "training step, ms"]
    text = [f"## Peak memory\n\n{found['model']}, one sequence of {found['tokens']} tokens a step, gradient "
            "checkpointing. GB of tensors, the first step, which measures, among them."]  # fmt: skip
    rows = found["rows"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = [
            [
                row["optimizer"],
                *(f"{row[key] / 1e9:.2f}" for key in ("weight_bytes", "gradient_bytes", "state_bytes", "peak_bytes")),
                f"{1e3 * row['step_seconds']:.0f}",
            ]
            for row in rows
            if row["setting"] == setting
        ]
        text.append(f"{setting}:\n\n{markdown_table(columns, of)}")
    return "\n\n".join(text)


def _quality(found: dict[str, Any]) -> str:
    task, whole = found.get("task"), found.get("whole_steps", {})
    text = ["## Quality"]
    if task:
        text.append(
            f"GPT-2 small ({task['parameters']:,} parameters), float32 weights under bfloat16 autocast, torch.compile: "
            f"{task['compiled']}. {task['tokens_a_step']:,} tokens a step, of {task['text']['train_tokens']:,} from "
            "the sources of the installed packages. Each rate is the best of short runs; one seed. "
            "Rates rise, then fall to zero; that of averaged stays, and its losses are its mean's. "
            "Seconds are those of training alone."
        )
    rows = []
    for run in found.get("runs", []):
        long = run.get("long")
        grid = ", ".join(f"{one['learning_rate']:g}: {one['eval_loss']:.3f}" for one in run["search"])
        if long:
            edge = " (end of the grid)" if run["at_the_end_of_the_grid"] else ""
            short = " (ended early)" if long["ended_early"] else ""
            rows.append([run["optimizer"], f"{long['eval_loss']:.3f}", f"{long['steps']}{short}",
                         f"{long['train_seconds']:.0f}", f"{run['learning_rate']:g}{edge}", grid,
                         f"{long['state_bytes'] / 1e9:.2f}"])  # fmt: skip
        else:
            rows.append([run["optimizer"], "cut off", "", "", "", grid, ""])
    if rows:
        columns = ["optimizer", "validation loss", "steps", "seconds", "best rate", "short runs", "state, GB"]
        text.append(markdown_table(columns, rows))
    if any("long" in run for run in found.get("runs", [])):
        text.append("![Validation loss over steps and over time](gpu_quality.png)")
    if whole.get("rows"):
        of = [
            [
                row["optimizer"],
                f"{row['ratio']:.3f}",
                f"{1e3 * row['seconds']:.0f}",
                f"{1e3 * row['optimizer_seconds']:.2f}",
            ]
            for row in whole["rows"]
        ]
        columns = ["optimizer", "whole step / AdamW's", "ms", "of these its own, ms"]
        text.append(f"Whole training steps of {whole['tokens']:,} tokens:\n\n{markdown_table(columns, of)}")
    return "\n\n".join(text)


def _first_step(found: dict[str, Any]) -> str:
    if not found.get("rows"):
        return ""
    rows = [
        [
            row["optimizer"],
            *(f"{1e3 * row[key]:.1f}" for key in ("first_seconds", "later_seconds")),
            *(f"{row[key] / 1e9:.2f}" for key in ("state_bytes", "temporary_bytes_first", "temporary_bytes_later")),
        ]
        for row in found["rows"]
    ]
    columns = ["optimizer", "first step, ms", "later, ms", "state, GB", "temporary in the first, GB", "later, GB"]
    return (
        f"## The first step\n\n{found['model']}, {found['layers']} layers, bfloat16: {found['parameters']:,} "
        f"parameters. SGD-SaI's first step measures.\n\n{markdown_table(columns, rows)}"
    )


def _engines(found: dict[str, Any]) -> str:
    if not found.get("rows"):
        return ""
    alone = {row["optimizer"]: row["losses"] for row in found["rows"] if row["engine"] == "none"}
    rows = []
    for row in found["rows"]:
        own = alone.get(row["optimizer"])
        apart = max(abs(a - b) for a, b in zip(row["losses"], own, strict=True)) if own else None
        rows.append([f"{row['optimizer']}, {row['engine']}", "" if apart is None else f"{apart:.1g}",
                     f"{1e3 * row['backward_and_step_seconds']:.1f}", f"{1e3 * row['optimizer_seconds']:.1f}",
                     f"{row['peak_bytes'] / 1e9:.2f}"])  # fmt: skip
    columns = ["optimizer, engine", "losses differ by", "backward and step, ms", "of these the step, ms", "peak, GB"]
    return (
        f"## FSDP2 and offload, one process\n\nGPT-2 small in float32, five steps.\n\n{markdown_table(columns, rows)}"
    )


def _left_out(results: Results) -> str:
    rows = [(name, reason) for part in results.values() for name, reason in part["not_measured"].items()]
    rows += [(name, part["status"]) for name, part in results.items() if part["status"] != COMPLETE]
    rows += [("warning", warning) for part in results.values() for warning in part["warnings"]]
    lines = dict.fromkeys(f"- {name}: {_code(reason)}" for name, reason in rows)
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _code(text: str) -> str:
    """A message as it came, whose words are not this page's."""
    text = " ".join(text.split()).replace("`", "'")
    return f"`{text}`"


def _cell(text: str) -> str:
    """The same in a table."""
    return _code(text).replace("|", "\\|")


# --- pictures


def step_times_picture(results: Results) -> Any:
    """Time over fused AdamW's of every optimizer, a column for each model; a bar marks each one's limit."""
    models = [
        m for m in results.get("step_times", {}).get("results", {}).get("models", []) if m["rows"] and "baseline" in m
    ]
    if not models:
        return None
    names = list(dict.fromkeys(row["optimizer"] for model in models for row in model["rows"]))[::-1]
    figure = new_figure(width=5 * len(models) + 2, height=1.2 + 0.3 * len(names))
    columns = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(columns, models, strict=True):
        for row in model["rows"]:
            place, ratio = names.index(row["optimizer"]), row["ratio"]
            color = COLORS[0 if row["rule"] else 1]
            axes.plot([ratio["lower_quartile"], ratio["upper_quartile"]], [place] * 2, color=color)
            axes.plot([ratio["median"]], [place], color=color, marker="o" if row["rule"] else "s")
            limit = row["limit_seconds"] / model["baseline"]["median_seconds"]
            axes.plot([limit], [place], color=TEXT, marker="|", markersize=10)
        axes.axvline(1, color=TEXT, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{model['model']}, {model['dtype']}", color=TEXT)
        dress(axes, "step time / fused AdamW's (log); bar: limit", "")
    return figure


def quality_picture(results: Results) -> Any:
    """Validation loss over steps, and over seconds of training."""
    runs = [run for run in results.get("quality", {}).get("results", {}).get("runs", []) if "long" in run]
    if not runs:
        return None
    figure = new_figure(width=10)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for index, run in enumerate(runs):
            points = run["long"]["points"]
            x, y = ([point[name] for point in points] for name in (key, "eval_loss"))
            look = {"color": COLORS[index % len(COLORS)], "marker": "os^Dv*"[index % 6]}
            axes.plot(x, y, **look, label=run["optimizer"])
        dress(axes, key, "validation loss" if key == "step" else "")
        axes.legend()
    return figure


if __name__ == "__main__":
    main()

"""Writes docs/results.json from what the benchmarks left, and from it the tables of README, docs and recipes.

    python benchmarks/results.py            # what `make results` runs
    python benchmarks/results.py --check    # changes nothing; names the pages that are out of date

A table stands between `<!-- results: NAME -->` and `<!-- /results -->`; everything outside is written by hand. In
docs/results.json "collected" is made anew from each recipe's `results/`; times come from docs/research/*_speed.json;
"stated" holds the few numbers whose runs are not kept, with the command, the date and the machine, and is edited by
hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

from scipy.stats import ttest_ind, ttest_rel

from benchmarks.lora_rules.__main__ import reported as lora_reported
from benchmarks.lora_rules.__main__ import table as lora_table
from benchmarks.lora_rules.rules import CANDIDATES
from benchmarks.quality.optimizers import RIVALS, VARIANTS
from benchmarks.quality.tables import reported as quality_reported
from benchmarks.quality.tables import tables as quality_tables
from benchmarks.training_step import ratio as training_step_ratio
from benchmarks.training_step import table as training_step_table
from hf_sai.cli.main import SUBCOMMANDS
from hf_sai.optim.options import OPTIONS
from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table
from recipes.common.lr_search import Results

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "results.json"
LORA_RESULTS = ROOT / "benchmarks" / "lora_rules" / "results"
PAGES = ("README.md", "docs/**/*.md", "recipes/*/README.md")
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)

ADAMW, SHORT, PUBLISHED = "adamw", "adamw, beta1 0.8", "sgd_sai"
FACTORED, PRESET = "sgd_sai, factored gradient", "sgd_sai, factored gradient, momentum 0.8"
PRESET_8BIT = PRESET + ", 8 bits"
ORTHOGONAL, AVERAGED = "sgd_sai, orthogonal", "sgd_sai, averaged"
RULES_AND_ADAMW = {"adamw", "published", "factored", "averaged", "orthogonal"}
QUALITY_TASKS = ("gpt2", "vit", "llama_code", "seq2seq", "vit_full", "smollm2_full", "bert_class")
#: Variants that lay an idea over a rule, where the others take something away from it.
IDEAS_TRIED = {name for name in VARIANTS if not name.endswith(("bit", "without_gsnr"))}
#: What the settings of a GPT-2 sweep are called elsewhere; the runs were made when `update` was `normalize_gradient`.
GPT2_SWEEP = {
    "demo_adamw": {"": ADAMW, "--adam_beta1 0.8": SHORT},
    "demo": {
        "--optim_args momentum=0.9": PUBLISHED,
        "--optim_args momentum=0.8": "sgd_sai, momentum 0.8",
        "--optim_args momentum_dtype=bfloat16": "sgd_sai, bfloat16 momentum",
        "--optim sgd_sai_8bit --optim_args momentum=0.9": "sgd_sai, 8-bit momentum",
        "--optim sgd_sai_4bit --optim_args momentum=0.9": "sgd_sai, 4-bit momentum",
        "--optim_args normalize_gradient=factored": FACTORED,
        "--optim_args normalize_gradient=factored,momentum=0.8": PRESET,
        "--optim_args normalize_gradient=factored,momentum=0.95": FACTORED + ", momentum 0.95",
        "--optim sgd_sai": PUBLISHED,
        "--optim sgd_sai_factored": PRESET,
        "--optim sgd_sai_orthogonal": ORTHOGONAL,
        "--optim sgd_sai_8bit": "sgd_sai, 8-bit momentum",
        "--optim sgd_sai_4bit": "sgd_sai, 4-bit momentum",
        "--optim sgd_sai --optim_args momentum=0.8": "sgd_sai, momentum 0.8",
        "--optim sgd_sai --optim_args momentum_dtype=bfloat16": "sgd_sai, bfloat16 momentum",
        "--optim sgd_sai --optim_args update=factored": FACTORED,
    },
}
#: Task -> (title, digits of its loss, section of its README).
TASKS = {
    "gpt2_pretraining": ("GPT-2 from scratch", 3, "#learning-rates-and-what-they-give"),
    "llama_lora": ("LoRA on SmolLM2-135M", 3, "#which-optimizer"),
    "diffusers_text_to_image": ("LoRA on a small Stable Diffusion", 4, "#which-optimizer"),
    "vit_classification": ("ViT from scratch", 3, "#which-optimizer"),
}
LENGTHS = {
    "gpt2_pretraining": "1.1 million parameters, 800 steps",
    "llama_lora": "docstrings, 60 steps",
    "diffusers_text_to_image": "flags, 60 steps",
    "vit_classification": "1,797 digits, 150 steps",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    check = parser.parse_args(argv).check
    stale = [path for path, text in written().items() if not path.is_file() or path.read_text() != text]
    if check and stale:
        sys.exit(f"out of date: {', '.join(str(path.relative_to(ROOT)) for path in stale)}; run `make results`.")
    for path, text in written().items():
        if path in stale:
            atomic_write(path, text)
            print(path.relative_to(ROOT))


def written() -> dict[Path, str]:
    """Every file that this script writes, with the text that it should have."""
    results = {"collected": collect(), "stated": json.loads(FILE.read_text())["stated"]}
    texts = {FILE: json.dumps(results, indent=1, ensure_ascii=False) + "\n"}
    for page in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)}):
        old = page.read_text()
        new = BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]](results)}\n{block[3]}", old)
        if "<!-- results: " in old:
            texts[page] = new
    return texts


def collect() -> dict[str, dict[str, Any]]:
    """Task -> optimizer -> what its runs gave, from the files that the recipes' benchmarks left."""
    collected: dict[str, dict[str, Any]] = {"gpt2_pretraining": summaries(gpt2_runs())}
    for task in TASKS:
        if task not in collected:
            results = Results(ROOT / "recipes" / task / "results" / "benchmark.json", {})
            collected[task] = summaries(results.runs)
    return collected


def gpt2_runs() -> list[dict[str, Any]]:
    """The runs of GPT-2's sweeps as the other recipes write theirs."""
    runs = []
    for file in sorted((ROOT / "recipes" / "gpt2_pretraining" / "results").glob("*.json")):
        for run in json.loads(file.read_text()):
            settings = run["settings"]
            runs.append(
                {
                    "candidate": GPT2_SWEEP[Path(settings["config"]).stem][settings["common"]],
                    "learning_rate": float(settings["learning_rate"]),
                    "seed": int(settings["seed"]),
                    "eval_loss": run["eval_loss"],
                }
            )
    return runs


def summaries(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Optimizer -> grid of seed 0, and at its best rate mean and standard deviation over the seeds."""
    found = {}
    for name in sorted({run["candidate"] for run in runs}):
        own = [run for run in runs if run["candidate"] == name]
        grid = {run["learning_rate"]: run["eval_loss"] for run in own if run["seed"] == 0}
        best = min(grid, key=lambda rate: float("inf") if grid[rate] is None else grid[rate])
        at_best = [run for run in own if run["learning_rate"] == best]
        found[name] = {
            "learning_rate": best,
            "grid": {f"{rate:g}": rounded(grid[rate]) for rate in sorted(grid)},
            "seeds": len(at_best),
            **spread("eval_loss", at_best),
            **(spread("eval_accuracy", at_best) if "eval_accuracy" in at_best[0] else {}),
            **({"state_bytes": at_best[0]["state_bytes"]} if "state_bytes" in at_best[0] else {}),
        }
    return found


def spread(key: str, runs: list[dict[str, Any]]) -> dict[str, float | None]:
    values = [run[key] for run in runs]
    if None in values:
        return {key: None, f"{key}_std": None}
    std = rounded(statistics.stdev(values)) if len(values) > 1 else None
    return {key: rounded(statistics.mean(values)), f"{key}_std": std}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def best_adamw(results: dict, task: str) -> str:
    """AdamW's best setting among those that were searched, as its candidates are named."""
    entries = results["collected"][task]
    return min((name for name in entries if name.startswith(ADAMW)), key=lambda name: entries[name]["eval_loss"])


def loss(results: dict, task: str, name: str) -> str:
    """Mean and standard deviation of a task's evaluation loss, or nothing where it was not run."""
    entry = results["collected"][task].get(name)
    if entry is None:
        return ""
    digits = TASKS[task][1]
    if entry["eval_loss_std"] is None:
        return f"{entry['eval_loss']:.{digits}f} (one seed)"
    return f"{entry['eval_loss']:.{digits}f} ± {entry['eval_loss_std']:.{digits}f}"


def accuracy(results: dict, name: str) -> str:
    entry = results["collected"]["vit_classification"].get(name)
    if entry is None:
        return ""
    return f"{100 * entry['eval_accuracy']:.1f} ± {100 * entry['eval_accuracy_std']:.1f}"


def bold_best(cells: list[str], best: Callable = min) -> list[str]:
    """The cells, the best number among them in bold, and what equals it as shown."""
    numbers = {cell: float(cell.split()[0]) for cell in cells if cell}
    chosen = best(numbers.values())
    return [f"**{cell}**" if cell and numbers[cell] == chosen else cell for cell in cells]


def state(results: dict, task: str, name: str) -> int:
    entry = results["collected"][task].get(name, {})
    return entry.get("state_bytes") or results["stated"]["gpt2_state_bytes"][name]


def share(results: dict, task: str, name: str) -> str:
    return f"{100 * state(results, task, name) / state(results, task, ADAMW):.0f} %"


def linked(task: str, *, folder: str = "../recipes") -> str:
    title, _, section = TASKS[task]
    return f"[{title}]({folder}/{task}/README.md{section}), {LENGTHS[task]}"


def speed_rows(model: str) -> dict[str, dict]:
    rows = {}
    for name in ("orthogonal_speed", "averaged_speed", "step_speed"):  # the baseline is the latter's
        report = json.loads((ROOT / "docs" / "research" / f"{name}.json").read_text())
        found = next((entry["rows"] for entry in report["models"] if entry["model"] == model), [])
        rows |= {row["optimizer"]: row for row in found}
    return rows


def headline(results: dict) -> str:
    """README's first table: AdamW as it comes, AdamW at its best setting, and the two kinds of SGD-SaI."""
    titles = {
        "gpt2_pretraining": "GPT-2 from scratch, 1.1 million parameters",
        "llama_lora": "LoRA on SmolLM2-135M",
        "diffusers_text_to_image": "LoRA on a small Stable Diffusion",
        "vit_classification": "ViT from scratch on digits, accuracy in %",
    }
    rows = []
    for task, title in titles.items():
        names = (ADAMW, best_adamw(results, task), ORTHOGONAL, AVERAGED, PRESET, PUBLISHED)
        if task == "vit_classification":
            rows.append([title, *bold_best([accuracy(results, name) for name in names], max)])
        else:
            rows.append([title, *bold_best([loss(results, task, name) for name in names])])
    tuned = ("adamw", "orthogonal", "averaged", "factored", "published")
    rows.append(
        [
            "a ViT that AdamW pretrained, fine-tuned, test loss",
            "",
            *bold_best([test_loss("vit_full", n) for n in tuned]),
        ]
    )
    gpt2 = speed_rows("gpt2")
    kinds = ("orthogonal", "averaged", "factored gradient")
    adamw, *ours = (gpt2[name] for name in ("torch AdamW, fused", *(f"SGD-SaI, {kind}" for kind in kinds), "SGD-SaI"))
    bytes_each = [f"{row['state_bytes_per_parameter']:.2f}" for row in (adamw, adamw, *ours)]
    rows.append(["optimizer state, bytes per parameter", *bytes_each])
    ratios = ["1", "1", *(f"{row['ratio']['median']:.{0 if row['ratio']['median'] > 10 else 2}f}" for row in ours)]
    rows.append(["time of the optimizer's part of a step on a CPU, GPT-2 small", *ratios])
    whole = [f"{training_step_ratio(training_step_report(), 'gpt2', name):.2f}" for name in tuned[1:]]
    rows.append(["time of a whole training step on a CPU, the GPT-2 above", "1", "1", *whole])
    settings = {setting(best_adamw(results, task)) for task in titles}
    ours = ("`sgd_sai_orthogonal`", "`sgd_sai_averaged`", "`sgd_sai_factored`", "`sgd_sai`, published")
    best = f"AdamW, {settings.pop()}" if len(settings) == 1 else "AdamW, its best setting"
    return markdown_table(["evaluation loss", "AdamW", best, *ours], rows)


def setting(name: str) -> str:
    """What a candidate's name says beside the optimizer: "beta1 0.8"."""
    return name.partition(", ")[2] or "as it comes"


def which_update(results: dict) -> str:
    """docs/which_update.md: every choice of the page on every task, AdamW's best setting named in its cell."""
    ours = {
        "sgd_sai_orthogonal": ORTHOGONAL,
        "sgd_sai_averaged": AVERAGED,
        "sgd_sai_factored": PRESET,
        "sgd_sai_factored_8bit": PRESET_8BIT,
        "sgd_sai": PUBLISHED,
    }
    rows = []
    for task, (title, _, _) in TASKS.items():
        best = best_adamw(results, task)
        cells = [loss(results, task, name) for name in (ADAMW, best, *ours.values())]
        cells[1] += f" ({setting(best)})"
        rows.append([f"{title}, {LENGTHS[task].split(', ')[1]}", *bold_best(cells)])
    return markdown_table(["task", "AdamW", "AdamW, best setting", *(f"`{name}`" for name in ours)], rows)


def starts(results: dict) -> str:
    """docs/learning_rate.md: the published algorithm's best rate and its neighbours, beside AdamW's."""
    rows = []
    for task, (title, digits, _) in TASKS.items():
        ours, adamw = (results["collected"][task][name] for name in (PUBLISHED, ADAMW))
        grid = {float(rate): value for rate, value in ours["grid"].items()}
        best = ours["learning_rate"]
        near = [grid.get(best / 2), grid[best], grid.get(best * 2)]
        shown = ["" if value is None else f"{value:.{digits}f}" for value in near]
        rows.append([title, f"{best:g}", *shown, f"{adamw['learning_rate']:g}", f"{best / adamw['learning_rate']:g}"])
    head = ["task", "best rate", "loss at half of it", "at it", "at twice of it", "AdamW's best rate", "factor"]
    return markdown_table(head, rows)


def commands(results: dict) -> str:
    """docs/commands.md: what `--help` says of every subcommand."""
    subparsers = argparse.ArgumentParser(prog="hf-sai").add_subparsers()
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return "\n\n".join(command_section(parser) for parser in subparsers.choices.values())


def command_section(parser: argparse.ArgumentParser) -> str:
    """A command's heading, description and arguments."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        values = (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.metavar or action.dest.upper()
        )
        takes_value = bool(action.option_strings) and action.nargs != 0
        help_text = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append([f"`{name} {values}`" if takes_value else f"`{name}`", help_text])
    table = markdown_table(["argument", "what it does"], [[cell.replace("|", "\\|") for cell in row] for row in rows])
    return f"## `{parser.prog}`\n\n{parser.description}\n\n{table.replace('--:', ':--')}"


def demo(results: dict) -> str:
    """What is shown of `make demo`."""
    runs = results["stated"]["demo"]
    adamw, ours = runs["adamw_torch_fused"], runs["sgd_sai_orthogonal"]
    rows = [
        ["learning rate", adamw["learning_rate"], ours["learning_rate"]],
        ["eval loss", *bold_best([f"{run['eval_loss']:.3f}" for run in (adamw, ours)])],
        ["perplexity", *bold_best([f"{run['eval_perplexity']:.1f}" for run in (adamw, ours)])],
        ["optimizer state (bytes)", f"{adamw['state_bytes']:,}", f"**{ours['state_bytes']:,}**"],
        ["time of the optimizer's step, against AdamW's", "**1**", ", ".join(map(str, ours["step_ratios"]))],
    ]
    return markdown_table(["", "AdamW (fused), beta1 0.8", "`sgd_sai_orthogonal`"], rows)


def published(results: dict) -> str:
    """docs/results.md: the published algorithm beside the others."""
    rows = []
    for task, (_, digits, _) in TASKS.items():
        names = (ADAMW, PUBLISHED, "sgd momentum", "official sgd-sai")
        lead = [results["collected"][task][name]["eval_loss"] for name in (PUBLISHED, ADAMW)]
        cells = bold_best([loss(results, task, name) for name in names])
        rows.append([linked(task), *cells, f"{lead[0] - lead[1]:.{digits}f}"])
    head = ["task", "AdamW", "SGD-SaI", "SGD with momentum", "official `sgd-sai` 1.0.3", "AdamW's lead"]
    return markdown_table(head, rows)


def rates(results: dict) -> str:
    """docs/results.md: learning rates and bytes of state."""
    rows = []
    for task, (title, _, _) in TASKS.items():
        best = [f"{results['collected'][task][name]['learning_rate']:g}" for name in (ADAMW, PUBLISHED, PRESET)]
        sizes = [f"{state(results, task, name):,}" for name in (ADAMW, PUBLISHED, PRESET)]
        rows.append([title, ", ".join(best), ", ".join(sizes)])
    what = "AdamW, SGD-SaI, SGD-SaI factored"
    return markdown_table(["task", f"learning rate of {what}", f"state of {what} (bytes)"], rows)


def factored(results: dict) -> str:
    """docs/results.md: the factored rule beside AdamW."""
    rows = []
    for task in TASKS:
        cells = bold_best([loss(results, task, name) for name in (ADAMW, SHORT, PRESET)])
        rows.append([TASKS[task][0], *cells, share(results, task, PRESET)])
        if PRESET_8BIT in results["collected"][task]:
            again = loss(results, task, PRESET_8BIT)
            rows.append(["the same, momentum in 8 bits", "", "", again, share(results, task, PRESET_8BIT)])
    head = ["task", "AdamW", "AdamW, beta1 0.8", "SGD-SaI, factored, momentum 0.8", "state, against AdamW's"]
    return markdown_table(head, rows)


def recipes(results: dict) -> str:
    """docs/results.md: all rules on all tasks."""
    names = {
        SHORT: "AdamW, beta1 0.8",
        PRESET: "**SGD-SaI, factored, momentum 0.8** (`sgd_sai_factored`)",
        PRESET_8BIT: "the same, momentum in 8 bits",
        ADAMW: "AdamW",
        FACTORED: "SGD-SaI, `update=factored`",
        "sgd_sai, momentum 0.8": "SGD-SaI, `momentum=0.8`",
        PUBLISHED: "SGD-SaI",
        "sgd_sai, unit rows": "SGD-SaI, `update=rows`",
    }
    columns = [bold_best([loss(results, task, name) for name in names]) for task in TASKS]
    rows = [[title, *cells] for title, cells in zip(names.values(), zip(*columns, strict=True), strict=True)]
    shares = [share(results, task, PRESET) for task in TASKS]
    shares[1] += f" ({share(results, 'llama_lora', PRESET_8BIT)})"
    rows.append(["state of the second line (third line), against AdamW's", *shares])
    return markdown_table(["", *(f"{TASKS[task][0]}, {LENGTHS[task].split(', ')[1]}" for task in TASKS)], rows)


def momentum(results: dict) -> str:
    """docs/low_bits.md: what fewer bits of momentum cost."""
    bits = {
        "float32": (4, "sgd_sai", PRESET),
        "bfloat16": (2, "sgd_sai, bfloat16 momentum", ""),
        "8 bits": (1.02, "sgd_sai, 8-bit momentum", PRESET_8BIT),
        "4 bits": (0.53, "sgd_sai, 4-bit momentum", ""),
        "AdamW": (8, ADAMW, ""),
    }
    rows = [
        [
            title,
            size,
            loss(results, "gpt2_pretraining", name),
            loss(results, "llama_lora", name),
            loss(results, "llama_lora", preset),
        ]
        for title, (size, name, preset) in bits.items()
    ]
    head = ["momentum", "bytes per element", "GPT-2 demo", "SmolLM2 LoRA", "the same, factored, momentum 0.8"]
    return markdown_table(head, rows)


def beside_adamw(results: dict) -> str:
    """docs/learning_rate.md: the preset at AdamW's best rate."""
    rows = []
    for task, (title, digits, _) in TASKS.items():
        adamw, ours = (results["collected"][task][name] for name in (ADAMW, PRESET))
        rate = f"{adamw['learning_rate']:g}"
        there, best = ours["grid"][rate], min(value for value in ours["grid"].values() if value is not None)
        worse = 100 * (there / best - 1)
        shown = "0" if there == best else f"{worse:.1f} %" if worse < 10 else f"{worse:.0f} %"
        own = f"{best:.{digits}f} ({ours['learning_rate']:g})"
        rows.append([title, rate, f"{adamw['grid'][rate]:.{digits}f}", f"{there:.{digits}f}", own, shown])
    head = ["task", "AdamW's best rate", "AdamW there", "SGD-SaI there", "its own best", "worse than that by"]
    return markdown_table(head, rows)


def step_speed(results: dict) -> str:
    """docs/speed.md: medians of every optimizer on every model."""
    report = json.loads((ROOT / "docs" / "research" / "step_speed.json").read_text())
    titles = {
        "gpt2": "GPT-2",
        "gpt2-medium:6": "medium, 6 layers",
        "gpt2-xl:2": "XL, 2 layers",
        "llama-2-7b:1": "Llama 2 7B, 1 layer",
        "vit-h-14:4": "ViT-H/14, 4 layers",
    }
    order = [*titles, *(entry["model"] for entry in report["models"] if entry["model"] not in titles)]
    models = {model: speed_rows(model) for model in order}
    gpt2 = models["gpt2"]
    rows = []
    for name in sorted(gpt2, key=lambda name: gpt2[name]["ratio"]["median"]):
        ours = name.startswith("SGD-SaI") and not name.endswith(("plain loop", "foreach"))
        times = [f"{rows_[name]['ratio']['median']:.2f}" if name in rows_ else "-" for rows_ in models.values()]
        size = f"{gpt2[name]['state_bytes_per_parameter']:.2f}"
        rows.append([f"**{name}**" if ours else name, *times, size])
    head = ["optimizer", *(titles.get(model, model) for model in order), "bytes of state per parameter, GPT-2"]
    return markdown_table(head, rows)


def training_step(_: dict) -> str:
    """docs/speed.md: whole steps of the recipes."""
    return training_step_table(training_step_report())


def training_step_report() -> dict:
    return json.loads((ROOT / "docs" / "research" / "training_step.json").read_text())


def search_table(task: str) -> Callable[[dict], str]:
    """A recipe's README: every optimizer with its grid, the best first."""

    def table(results: dict) -> str:
        digits, entries = TASKS[task][1], results["collected"][task]
        times = results["stated"]["step_times"].get(task, {}).get("ratios", {})
        head = ["optimizer", "eval loss", "best rate", "grid, seed 0"]
        head += ["accuracy (%)"] if task == "vit_classification" else []
        head += ["state (bytes)"] if task != "gpt2_pretraining" else []
        head += ["step time, times AdamW's"] if times else []
        rows = []
        for name in sorted(entries, key=lambda name: entries[name]["eval_loss"]):
            entry = entries[name]
            tried = {rate: "diverged" if x is None else f"{x:.{digits}f}" for rate, x in entry["grid"].items()}
            row = [f"`{name}`", loss(results, task, name), f"{entry['learning_rate']:g}"]
            row.append(", ".join(f"{rate}: {shown}" for rate, shown in tried.items()))
            row += [accuracy(results, name)] if "eval_accuracy" in entry else []
            row += [f"{entry['state_bytes']:,}"] if "state_bytes" in entry else []
            rows.append(row + ([times[name]] if times else []))
        return markdown_table(head, rows)

    return table


def options(results: dict) -> str:
    """docs/options.md: the optimizer's options."""
    rows = []
    for option in OPTIONS.values():
        default = "none" if option.default is None else str(option.default).lower()
        given = f"`--{option.of_trainer}`" if option.of_trainer else f"`--optim_args {option.name}=...`"
        per_group = "yes" if option.per_group else "no"
        rows.append([f"`{option.name}`", f"`{default}`", option.allowed, option.help, given, per_group])
    head = ["option", "default", "allowed", "what it does", "with Trainer", "per group"]
    table = markdown_table(head, rows)
    return table.replace("--:", ":--")


def of_quality(task: str, names: Iterable[str]) -> tuple[dict[str, Results], dict[str, int]]:
    """What benchmarks/quality has kept of a task, by the optimizer, and the task's own steps and rows in a step."""
    folder = ROOT / "benchmarks" / "quality" / "results" / task
    files = [file for name in sorted(names) if (file := folder / f"{name}.json").is_file()]
    own = importlib.import_module(f"benchmarks.quality.tasks.{task}")
    return {file.stem: Results(file, {}) for file in files}, {"steps": own.STEPS, "batch_size": own.BATCH_SIZE}


def test_loss(task: str, name: str) -> str:
    """Mean and standard deviation on the test rows, at the best settings, over the seeds that chose nothing."""
    stores, own = of_quality(task, [name])
    return mean_and_spread([run["test_loss"] for run in quality_reported(stores[name], name, **own)])


def mean_and_spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def rivals(task: str, names: Iterable[str], **other: int) -> Callable[[dict], str]:
    """What benchmarks/quality measured on a task: every optimizer that was repeated with the seeds that report.

    Args:
        task: Its name.
        names: Of the optimizers.
        other: ``steps`` or ``batch_size`` where they are not the task's own.
    """

    def table(_: dict) -> str:
        stores, own = of_quality(task, names)
        lines = quality_tables(stores, **own | other).split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if "not yet" not in line)

    return table


def lora_rules(task: str, steps: int) -> Callable[[dict], str]:
    """What benchmarks/lora_rules measured at rank 8 in so many steps."""

    def table(_: dict) -> str:
        return lora_table(Results(LORA_RESULTS / f"{task}_rank_8_steps_{steps}.json", {}), list(CANDIDATES))

    return table


def nesterov(_: dict) -> str:
    """Of each task the factored rule with Nesterov's momentum and without, beside AdamW."""
    rows = []
    for task, title in {
        "gpt2": "GPT-2 from scratch",
        "vit": "ViT from scratch",
        "vit_full": "a pretrained ViT",
    }.items():
        names = ("adamw", "factored", "factored_nesterov")
        stores, own = of_quality(task, names)
        losses = [[run["test_loss"] for run in quality_reported(stores[name], name, **own)] for name in names]
        rows.append((title, losses, partial(ttest_ind, equal_var=False)))
    results = Results(LORA_RESULTS / "smollm2_rank_8_steps_60.json", {})
    runs = [lora_reported(results, name) for name in ("adamw", "factored", "factored, nesterov")]
    losses = [[run["test_loss"] for run in sorted(own, key=lambda run: run["seed"])] for own in runs]
    rows.append(("LoRA on SmolLM2-135M", losses, ttest_rel))
    shown = []
    for title, (adamw, without, ours), test in rows:
        chances = [f"{test(ours, other).pvalue:.1g}" for other in (without, adamw)]
        shown.append([title, *bold_best([mean_and_spread(each) for each in (adamw, without, ours)]), *chances])
    head = ["task", "AdamW", "`factored`", "the same, `nesterov=true`", "p against without", "p against AdamW"]
    return markdown_table(head, shown)


def lora_ranks(task: str, steps: int) -> Callable[[dict], str]:
    """Validation loss over rank and learning rate, with the one seed that chooses the rate."""

    def table(_: dict) -> str:
        tried = []
        for file in LORA_RESULTS.glob(f"{task}_rank_*_steps_{steps}.json"):
            results, rank = Results(file, {}), int(file.stem.split("_")[2])
            for name in ("adamw", "averaged"):
                losses = {run["learning_rate"]: f"{run['eval_loss']:.4f}" for run in results.find(name, seed=0)}
                if losses:
                    losses[results.best(name)] = f"**{losses[results.best(name)]}**"
                    tried.append((rank, name, losses))
        tried.sort(key=lambda line: line[:2])
        rates = sorted({rate for _, _, losses in tried for rate in losses})
        rows = [[rank, name, *(losses.get(rate, "") for rate in rates)] for rank, name, losses in tried]
        return markdown_table(["rank", "candidate", *(f"{rate:g}" for rate in rates)], rows)

    return table


TABLES: dict[str, Callable[[dict], str]] = {
    "headline": headline,
    "which-update": which_update,
    "starts": starts,
    "commands": commands,
    "demo": demo,
    "published": published,
    "rates": rates,
    "factored": factored,
    "recipes": recipes,
    "momentum": momentum,
    "beside-adamw": beside_adamw,
    "step-speed": step_speed,
    "training-step": training_step,
    "options": options,
    **{task.replace("_", "-"): search_table(task) for task in TASKS},
    **{f"lora-smollm2-{steps}": lora_rules("smollm2", steps) for steps in (60, 300)},
    **{f"lora-bytes-{steps}": lora_rules("bytes", steps) for steps in (100, 300, 1000)},
    **{f"lora-ranks-{task}": lora_ranks(task, steps) for task, steps in {"smollm2": 60, "bytes": 100}.items()},
    **{f"variants-{task}": rivals(task, RULES_AND_ADAMW | VARIANTS.keys() - IDEAS_TRIED) for task in ("gpt2", "vit")},
    **{
        f"ideas-{task.replace('_', '-')}": rivals(task, {"adamw", "factored", "orthogonal"} | IDEAS_TRIED)
        for task in ("gpt2", "vit", "vit_full")
    },
    "nesterov": nesterov,
    **{
        f"{task.replace('_', '-')}-steps-{steps}": rivals(task, RIVALS, steps=steps)
        for task, lengths in {"gpt2": (3200,), "vit": (600, 2400), "llama_code": (200,), "seq2seq": (200,)}.items()
        for steps in lengths
    },
    **{f"vit-rows-{rows}": rivals("vit", RIVALS.keys() | IDEAS_TRIED, batch_size=rows) for rows in (2, 8)},
    "gpt2-rows-2": rivals("gpt2", RIVALS, batch_size=2),
    "gpt2-rows-32": rivals("gpt2", RIVALS, batch_size=32, steps=200),
    **{f"rivals-{task.replace('_', '-')}": rivals(task, RIVALS) for task in QUALITY_TASKS},
}


if __name__ == "__main__":
    main()

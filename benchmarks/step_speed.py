"""Time SGD-SaI's ways to step beside other optimizers, interleaved in one run, and count the bytes that each keeps.

    python benchmarks/step_speed.py gpt2 gpt2-xl:2 llama-2-7b:1 split-16 split-1024 --output docs/research/step_speed

A model is a name that `hf-sai memory` knows, whole or with its first layers only (`gpt2-xl:2`), or `split-N`: 2^24
elements in N tensors. No weights are loaded: parameters and gradients are random numbers, and a few optimizers at a
time update the same parameters in turn, beside torch's fused AdamW. One that is not installed, or fails, is named in
the result with the reason.

`--clock cpu` counts the processor's time instead of the wall's, with one thread: right on a machine with other work.
"""

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

import torch

from hf_sai import SGDSaI, param_groups
from hf_sai.memory.skeletons import build_skeleton
from hf_sai.publishing.plots import COLORS, TEXT, draw, dress, layer_and_kind, new_figure
from hf_sai.runs.files import atomic_write
from hf_sai.runs.meters import state_bytes
from recipes.common.comparison import interleaved_step_times, markdown_table, step_time_ratio

BASELINE = "torch AdamW, fused"
AT_A_TIME = 2  # beside the baseline: a model of half a billion parameters then fits into 24 GiB
LONGEST_STEP = 60.0  # seconds: a matrix of 4,096 rows takes minutes to be made orthogonal on a CPU
LR = 1e-6  # so small that parameters which are updated a thousand times stay what they are


class Named(list[tuple[str, torch.nn.Parameter]]):
    """The names and parameters of a model.

    Args:
        model: What it is called on the command line.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


def official(named: Named) -> torch.optim.Optimizer:
    from sgd_sai import SGD_sai

    return SGD_sai([p for _, p in named], lr=LR, weight_decay=0.01)


def pytorch_optimizer_sai(named: Named) -> torch.optim.Optimizer:
    from pytorch_optimizer import SGDSaI as TheirSGDSaI

    return TheirSGDSaI([p for _, p in named], lr=LR, weight_decay=0.01)


def adam_mini(named: Named) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    return Adam_mini(named, lr=LR, weight_decay=0.01, dim=768, n_heads=12)


def bitsandbytes_adamw(named: Named) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([p for _, p in named], lr=LR, weight_decay=0.01)


def torchao_adamw(named: Named) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit([p for _, p in named], lr=LR, weight_decay=0.01)


def sai(**options: object) -> Callable[[Named], torch.optim.Optimizer]:
    return lambda named: SGDSaI(named, lr=LR, weight_decay=0.01, **options)


def orthogonal(named: Named) -> torch.optim.Optimizer:
    """What is a hidden matrix is read from the whole model, of which some layers are here."""
    here = dict(named)
    groups = []
    for group in param_groups(
        build_skeleton(named.model.partition(":")[0]), lr=LR, weight_decay=0.01, update="orthogonal"
    ):
        if own := [(name, here[name]) for name, _ in group["params"] if name in here]:
            groups.append({**group, "params": own})
    return SGDSaI(groups, lr=LR, weight_decay=0.01, update="orthogonal")


def of_torch(kind: type, **options: object) -> Callable[[Named], torch.optim.Optimizer]:
    return lambda named: kind([p for _, p in named], lr=LR, **options)


OPTIMIZERS: dict[str, Callable[[Named], torch.optim.Optimizer]] = {
    BASELINE: of_torch(torch.optim.AdamW, fused=True),
    "torch AdamW, foreach": of_torch(torch.optim.AdamW, foreach=True),
    "torch SGD with momentum, fused": of_torch(torch.optim.SGD, momentum=0.9, fused=True),
    "SGD-SaI": sai(),
    "SGD-SaI, fused": sai(fused=True),
    "SGD-SaI, foreach": sai(foreach=True),
    "SGD-SaI, plain loop": sai(foreach=False),
    "SGD-SaI, factored gradient": sai(update="factored"),
    "SGD-SaI, averaged": sai(update="averaged"),
    "SGD-SaI, orthogonal": orthogonal,
    "SGD-SaI, bfloat16 momentum": sai(momentum_dtype=torch.bfloat16),
    "SGD-SaI, 8-bit momentum": sai(momentum_dtype="8bit"),
    "SGD-SaI, 4-bit momentum": sai(momentum_dtype="4bit"),
    "official sgd-sai": official,
    "pytorch-optimizer SGDSaI": pytorch_optimizer_sai,
    "Adam-mini": adam_mini,
    "bitsandbytes AdamW, 8 bits": bitsandbytes_adamw,
    "torchao AdamW, 8 bits": torchao_adamw,
}


def main(argv: list[str] | None = None) -> dict:
    options = make_parser().parse_args(argv)
    if options.clock == "cpu":
        torch.set_num_threads(1)
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    report = {"environment": environment(argv), "models": []}
    for model in options.models:
        report["models"].append(measure(model, options.only, options.rounds, clock))
        write(report, options.output)
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME, NAME:LAYERS or split-N")
    parser.add_argument("--output", type=Path, required=True, help="path of the .json, .md and .png, without suffix")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="OPTIMIZER")
    return parser


def shapes_of(model: str) -> list[tuple[str, torch.Size]]:
    """Names and shapes of a model's parameters, of its first layers if it says so."""
    if model.startswith("split-"):
        count = int(model.removeprefix("split-"))
        return [(f"tensor{i}", torch.Size([2**24 // count])) for i in range(count)]
    name, _, layers = model.partition(":")
    shapes = [(n, p.shape) for n, p in build_skeleton(name).named_parameters()]
    numbers = [layer_and_kind(n)[0] for n, _ in shapes]
    kept = [not (layers and number.isdigit() and int(number) >= int(layers)) for number in numbers]
    return [shape for shape, keep in zip(shapes, kept, strict=True) if keep]


def measure(model: str, names: list[str], rounds: int, clock: Callable[[], float]) -> dict:
    """All optimizers on one model's shapes."""
    torch.manual_seed(0)
    named = Named(model)
    for name, shape in shapes_of(model):
        p = torch.nn.Parameter(0.02 * torch.randn(shape))
        p.grad = 1e-3 * torch.randn(shape)
        named.append((name, p))
    SGDSaI([torch.nn.Parameter(torch.ones(2))], fused=True)  # what it imports is not its first step's
    rows, skipped = [], {}
    others = [name for name in dict.fromkeys(names) if name != BASELINE]
    for start in range(0, max(1, len(others)), AT_A_TIME):
        measured, failed = measure_together(named, others[start : start + AT_A_TIME], rounds, clock)
        rows += [row for row in measured if start == 0 or row["optimizer"] != BASELINE]
        skipped |= failed
    elements = sum(p.numel() for _, p in named)
    return {"model": model, "parameters": elements, "tensors": len(named), "rows": rows, "skipped": skipped}


def measure_together(
    named: Named, names: list[str], rounds: int, clock: Callable[[], float]
) -> tuple[list[dict], dict[str, str]]:
    """(rows of the baseline and these optimizers, reasons of those that failed), timed in turn."""
    optimizers, first, failed = {}, {}, {}
    for name in [BASELINE, *names]:
        try:
            optimizer = OPTIMIZERS[name](named)
            start = clock()
            optimizer.step()
            first[name] = clock() - start
            if first[name] > LONGEST_STEP:
                failed[name] = f"a step takes {first[name]:.0f} s"
            else:
                optimizers[name] = optimizer
        except Exception as error:  # whatever stops another package here is told, not hidden
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds = interleaved_step_times(optimizers, rounds=rounds, warmup=2, clock=clock)
    elements = sum(p.numel() for _, p in named)
    rows = [
        {
            "optimizer": name,
            "ratio": step_time_ratio(times, seconds[BASELINE]),
            "median_seconds": statistics.median(times),
            "first_step_seconds": first[name],
            "state_bytes_per_parameter": state_bytes(optimizers[name]) / elements,
        }
        for name, times in seconds.items()
    ]
    return rows, failed


def environment(argv: list[str] | None) -> dict[str, str]:
    """Hardware, versions, date and command."""
    packages = ("torch", "numba", "sgd-sai", "pytorch-optimizer", "bitsandbytes", "adam-mini", "torchao")
    return {
        "command": "python benchmarks/step_speed.py " + shlex.join(sys.argv[1:] if argv is None else argv),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
    }


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write(report: dict, output: Path) -> None:
    """The report as JSON, tables and pictures."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(tables(report))
    atomic_write(output.with_suffix(".png"), draw(picture(report["models"][0])))


def tables(report: dict) -> str:
    parts = ["<!-- Written by benchmarks/step_speed.py. -->", "", f"`{report['environment']['command']}`", ""]
    parts += [", ".join(f"{key} {value}" for key, value in report["environment"].items() if key != "command"), ""]
    columns = ["optimizer", "time / fused AdamW's", "quartiles", "ms", "first step, ms", "state, bytes/parameter"]
    for model in report["models"]:
        parts += [f"## {model['model']}: {model['parameters']:,} parameters in {model['tensors']} tensors", ""]
        rows = [
            [
                row["optimizer"],
                f"{row['ratio']['median']:.2f}",
                f"{row['ratio']['lower_quartile']:.2f} to {row['ratio']['upper_quartile']:.2f}",
                f"{1e3 * row['median_seconds']:.1f}",
                f"{1e3 * row['first_step_seconds']:.0f}",
                f"{row['state_bytes_per_parameter']:.2f}",
            ]
            for row in sorted(model["rows"], key=lambda row: row["ratio"]["median"])
        ]
        parts += [markdown_table(columns, rows), ""]
        parts += [f"Not measured: {name} ({reason})." for name, reason in model["skipped"].items()]
        parts += [""] if model["skipped"] else []
    return "\n".join(parts)


def picture(model: dict):
    """Step time beside bytes of state, one line for each optimizer; ours are filled."""
    rows = sorted(model["rows"], key=lambda row: -row["ratio"]["median"])
    figure = new_figure(width=10, height=1.2 + 0.3 * len(rows))
    times, sizes = figure.subplots(1, 2, sharey=True)
    for position, row in enumerate(rows):
        ours = row["optimizer"].startswith("SGD-SaI")
        color = COLORS[0 if ours else 1]
        look = {"color": color, "marker": "o" if ours else "s", "markerfacecolor": color if ours else "none"}
        ratio = row["ratio"]
        times.plot([ratio["lower_quartile"], ratio["upper_quartile"]], [position] * 2, color=color)
        times.plot([ratio["median"]], [position], **look)
        sizes.plot([row["state_bytes_per_parameter"]], [position], **look)
    times.axvline(1, color=TEXT, linewidth=0.8)
    times.set_xscale("log")
    times.set_yticks(range(len(rows)), [row["optimizer"] for row in rows])
    sizes.set_xlim(0, None)
    dress(times, "step time / fused AdamW's (log)", "")
    dress(sizes, "optimizer state, bytes per parameter", "")
    return figure


if __name__ == "__main__":
    main()

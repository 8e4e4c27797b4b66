"""Where SGD-SaI loses to AdamW, and which changes win it back: many variants of a tiny GPT on bytes, one process.

    python benchmarks/gap.py                        # every experiment, then the table; about 1.5 minutes each
    python benchmarks/gap.py --experiments classes  # one of them
    python benchmarks/gap.py --table                # the table of what stands in the results file

The variants of an experiment are trained side by side as one batched model, from one start on the same batches, and
differ only in how each class of tensors is updated: matrices, the token embedding (which is also the head), positions,
vectors (biases and norms). Each variant is written as ``rule@learning rate``, for all tensors or for one class:
``sai@1e-2`` or ``sai@1e-2 embedding=adam@4e-3``. Finished variants stand in the results file and are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

import torch
from torch import Tensor, nn

from hf_sai.optim.gsnr import measure_gsnr
from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table
from recipes.common.stdlib_corpus import load_documents

F = nn.functional

LAYERS, WIDTH, HEADS, CONTEXT, BYTES = 2, 64, 2, 64, 256
BATCH, WEIGHT_DECAY, CLIP = 8, 0.01, 1.0
VALIDATION_ROWS = 512
CLASSES = ("matrix", "embedding", "position", "vector")

EXPERIMENTS = {
    "rules": ["adam@4e-3", "sai@1e-2", "g_rows@4e-3", "rows@2e-3", "g_tensor@4e-3"],
    "rows": [
        "g_rows@8e-3",
        "g_rows@4e-3 embedding=adam@4e-3",
        "g_rows@4e-3 embedding=sai@1e-2",
        "v_rows@4e-3",
        "v_tensor@4e-3",
    ],
    "running": [
        "r_rows@4e-3",
        "r_factored@4e-3",
        "r_factored:snr@4e-3",
        "g_rows@4e-3 embedding=r_rows@4e-3",
        "g_columns@4e-3 embedding=r_rows@4e-3",
    ],
    "rates": ["sai@2e-2", "sai@4e-2", "adam@8e-3"],
    "classes": [f"sai@1e-2 {name}=adam@4e-3" for name in CLASSES],
    "settings": [
        "sai:mu0.8@1e-2",
        "sai:nesterov@1e-2",
        "sai@1e-2 warmup=0.05",
        "sai@4e-2 clip=0.1",
        "sai@1e-2 decay=0",
    ],
    "scales": ["sai:cap64@1e-2", "sai:cap64@2e-2", "sai:floor64@1e-2", "sai:floor64@2e-2", "sai:floor32@2e-2"],
}


@dataclass
class Variant:
    """An update rule with its learning rate for every class of tensors.

    Attributes:
        name: As it was written.
        rules: Class -> (rule, learning rate).
        settings: What differs from the defaults: ``clip``, ``warmup`` (a share of the steps), ``decay`` (weight decay).
    """

    name: str
    rules: dict[str, tuple[str, float]]
    settings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read ``rule@lr [class=rule@lr ...] [setting=number ...]``."""
        first, *changes = text.split()
        variant = cls(text, dict.fromkeys(CLASSES, _rule(first)))
        for key, _, value in (change.partition("=") for change in changes):
            if key in CLASSES:
                variant.rules[key] = _rule(value)
            else:
                variant.settings[key] = float(value)
        return variant


def _rule(text: str) -> tuple[str, float]:
    rule, _, lr = text.partition("@")
    return rule, float(lr)


class Rule:
    """How one tensor is updated: ``NAME[:modifier ...]``; at most one state tensor, but for ``adam``.

    ``sai``: momentum times g-SNR, the published algorithm. ``adam``: AdamW. ``rows``, ``columns``, ``tensor``: momentum
    with every row, every column or the whole at root-mean-square 1. ``g_rows``, ``g_columns``, ``g_tensor``: the same
    done to the gradient, before the momentum. ``v_rows``, ``v_tensor``: momentum divided by a running root-mean-square
    of every row or the whole (Adam-mini, arXiv 2406.16793, with a row or a tensor as block), ``v_factored`` by one that
    is factored as in Adafactor, with one of every element for vectors. ``r_rows``, ``r_columns``, ``r_factored``: the
    gradient divided by a running one, before the momentum. ``frozen``, ``frozen_rows``: momentum divided by the first
    gradient's root-mean-square. ``sign``: its sign. Modifiers: ``mu0.8`` (momentum), ``beta0.99`` (of the running
    averages), ``nesterov``, ``snr`` (times g-SNR / sqrt(elements)), ``cap64`` and ``floor64`` (the g-SNR is at most, at
    least that), ``clipped`` (what ``r_`` has divided gets a root-mean-square of at most 1, as in Adafactor),
    ``estimated`` (the same, but of matrices that is estimated from what the rows' and the columns' are now and on
    average, the larger of both).
    """

    def __init__(self, text: str, gradient: Tensor) -> None:
        self.name, *modifiers = text.split(":")
        self.mu = next((float(m[2:]) for m in modifiers if m.startswith("mu")), 0.9)
        self.beta = next((float(m[4:]) for m in modifiers if m.startswith("beta")), 0.999)
        self.nesterov = "nesterov" in modifiers
        self.clip = next((m for m in modifiers if m in ("clipped", "estimated")), None)
        gsnr = measure_gsnr([gradient])[0]
        for modifier in modifiers:
            if modifier.startswith("cap"):
                gsnr = min(gsnr, float(modifier[3:]))
            elif modifier.startswith("floor"):
                gsnr = max(gsnr, float(modifier[5:]))
        ratio = gsnr / math.sqrt(gradient.numel())
        self.scale = gsnr if self.name == "sai" else ratio if "snr" in modifiers else 1.0
        self.steps = 0
        self.v = torch.zeros_like(gradient)
        self.m = torch.zeros_like(gradient)
        self.first_rms = _rms(gradient, "rows" if self.name == "frozen_rows" else "tensor")

    def update(self, gradient: Tensor) -> Tensor:
        """What to subtract, per unit of learning rate."""
        self.steps += 1
        if self.name == "adam":
            return self._adam(gradient)
        if self.name[:2] in ("v_", "r_"):
            self.v.lerp_(_mean_square(gradient, self.name[2:]).expand_as(gradient), 1 - self.beta)
        mean_square = self.v / (1 - self.beta**self.steps)
        if self.name[2:] == "factored" and mean_square.ndim > 1:
            mean_square = _factored(mean_square)
        gradient = self._incoming(gradient, mean_square)
        self.m.lerp_(gradient, 1 - self.mu if self.steps > 1 else 1.0)
        step = self.m.lerp(gradient, 1 - self.mu) if self.nesterov else self.m
        if self.name in ("rows", "columns", "tensor"):
            step = step / _rms(step, self.name)
        elif self.name.startswith("v_"):
            step = step / (mean_square.sqrt() + 1e-12)
        elif self.name.startswith("frozen"):
            step = step / self.first_rms
        elif self.name == "sign":
            step = step.sign()
        return step * self.scale

    def _incoming(self, gradient: Tensor, mean_square: Tensor) -> Tensor:
        if self.name.startswith("r_"):
            unit = gradient / (mean_square.sqrt() + 1e-12)
            if self.clip == "estimated" and gradient.ndim > 1:
                now, running = gradient.square(), self.v / (1 - self.beta**self.steps)
                shares = [(now.mean(dim) / (running.mean(dim) + 1e-24)).mean() for dim in (0, 1)]
                return unit / max(shares).sqrt().clamp(min=1.0)
            return unit / _rms(unit, "tensor").clamp(min=1.0) if self.clip else unit
        return gradient / _rms(gradient, self.name[2:]) if self.name.startswith("g_") else gradient

    def _adam(self, gradient: Tensor) -> Tensor:
        self.m.lerp_(gradient, 1 - self.mu)
        self.v.lerp_(gradient.square(), 1 - self.beta)
        mean, square = self.m / (1 - self.mu**self.steps), self.v / (1 - self.beta**self.steps)
        return mean / (square.sqrt() + 1e-8)


def _rms(x: Tensor, how: str) -> Tensor:
    return _mean_square(x, how).sqrt() + 1e-12


def _mean_square(x: Tensor, how: str) -> Tensor:
    """Of every row, every column or, for vectors always, the whole; ``factored`` leaves every element."""
    if how == "factored":
        return x.square()
    dims = {"rows": (-1,), "columns": (0,)}.get(how, ()) if x.ndim > 1 else ()
    return x.square().mean(dims or None, keepdim=True)


def _factored(v: Tensor) -> Tensor:
    """What Adafactor (arXiv 1804.04235) keeps of a matrix: the product of its rows' and columns' means, by its mean."""
    return v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()


def initial(seed: int) -> dict[str, Tensor]:
    """GPT-2's initialisation; linear weights are [outputs, inputs]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    p = {"embedding": normal(BYTES, WIDTH), "position": normal(CONTEXT, WIDTH)}
    into_residual = 0.02 / math.sqrt(2 * LAYERS)
    for i in range(LAYERS):
        for name, outputs, inputs, std in (
            ("qkv", 3 * WIDTH, WIDTH, 0.02),
            ("proj", WIDTH, WIDTH, into_residual),
            ("up", 4 * WIDTH, WIDTH, 0.02),
            ("down", WIDTH, 4 * WIDTH, into_residual),
        ):
            p |= {f"{i}.{name}.weight": normal(outputs, inputs, std=std), f"{i}.{name}.bias": torch.zeros(outputs)}
        for norm in ("norm1", "norm2"):
            p |= {f"{i}.{norm}.weight": torch.ones(WIDTH), f"{i}.{norm}.bias": torch.zeros(WIDTH)}
    return {**p, "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}


def class_of(name: str) -> str:
    if name in CLASSES:
        return name
    return "matrix" if name.endswith("weight") and "norm" not in name else "vector"


def losses_of(p: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Next-byte losses of all models, float32[models, rows, CONTEXT - 1]; parameters lead with the models."""
    x, targets = tokens[:, :-1], tokens[:, 1:]
    models, (rows, length) = p["embedding"].shape[0], x.shape

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (WIDTH,)) * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

    def linear(h: Tensor, name: str) -> Tensor:
        return torch.baddbmm(p[f"{name}.bias"][:, None], h, p[f"{name}.weight"].transpose(1, 2))

    h = (p["embedding"][:, x] + p["position"][:, None, :length]).flatten(1, 2)
    for i in range(LAYERS):
        qkv = linear(norm(h, f"{i}.norm1"), f"{i}.qkv").view(models * rows, length, 3, HEADS, WIDTH // HEADS)
        heads = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        h = h + linear(heads.transpose(1, 2).reshape(models, rows * length, WIDTH), f"{i}.proj")
        h = h + linear(F.gelu(linear(norm(h, f"{i}.norm2"), f"{i}.up"), approximate="tanh"), f"{i}.down")
    logits = torch.bmm(norm(h, "norm"), p["embedding"].transpose(1, 2))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().repeat(models), reduction="none")
    return losses.view(models, rows, length)


def train(
    variants: list[Variant], rows: tuple[Tensor, Tensor], steps: int, seed: int, batch_size: int = BATCH
) -> Iterator[dict[str, Any]]:
    """Train all variants side by side; yield what came out of each."""
    training, validation = rows
    names = list(start := initial(seed))
    p = {name: nn.Parameter(tensor.expand(len(variants), *tensor.shape).clone()) for name, tensor in start.items()}
    rules: list[dict[str, Rule]] = [{} for _ in variants]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(seed + 1000)
    curves = []
    for step in range(steps):
        batch = training[torch.randint(len(training), (batch_size,), generator=generator)]
        loss = losses_of(p, batch).mean((1, 2))
        loss.sum().backward()
        curves.append(loss.tolist())
        if step % 10 == 0:  # of the first variant
            measured = measure_gsnr([_gradient(p[name])[0] for name in names])
            for name, gsnr in zip(names, measured, strict=True):
                ratios[name].append(round(gsnr / math.sqrt(start[name].numel()), 4))
        _update(p, variants, rules, step, steps)
    for index, variant in enumerate(variants):
        yield {
            "variant": variant.name,
            "steps": steps,
            "seed": seed,
            "batch": batch_size,
            **_validate({name: tensor[index : index + 1] for name, tensor in p.items()}, training, validation),
            "train_loss": [round(sum(part) / len(part), 4) for part in _parts([c[index] for c in curves], 20)],
            **({"gsnr_ratio": ratios} if index == 0 else {}),
        }


@torch.no_grad()
def _update(
    p: dict[str, nn.Parameter], variants: list[Variant], rules: list[dict[str, Rule]], step: int, steps: int
) -> None:
    """One step of every variant: warmup, then a cosine down to 0; clipping by the norm of all gradients."""
    norms = sum(_gradient(tensor).flatten(1).square().sum(1) for tensor in p.values()).sqrt()
    for index, (variant, mine) in enumerate(zip(variants, rules, strict=True)):
        settings = variant.settings
        warmup = settings.get("warmup", 0.25) * steps
        part = (
            (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        )
        clip = min(1.0, settings.get("clip", CLIP) / (norms[index].item() + 1e-6))
        for name, tensor in p.items():
            rule, lr = variant.rules[class_of(name)]
            gradient = _gradient(tensor)[index] * clip
            if name not in mine:
                mine[name] = Rule(rule, gradient)
            tensor[index].mul_(1 - part * lr * settings.get("decay", WEIGHT_DECAY))
            tensor[index].sub_(mine[name].update(gradient), alpha=part * lr)
    for tensor in p.values():
        tensor.grad = None


@torch.no_grad()
def _validate(p: dict[str, Tensor], training: Tensor, validation: Tensor) -> dict[str, Any]:
    """The loss, and its mean in four bands of bytes that hold a quarter of the training text each, frequent first."""
    losses = torch.cat([losses_of(p, batch).flatten() for batch in validation.split(64)])
    targets = validation[:, 1:].flatten()
    counts = torch.bincount(training.flatten(), minlength=BYTES)
    order = counts.argsort(descending=True)
    before = counts[order].cumsum(0) - counts[order]
    band = torch.empty(BYTES, dtype=torch.long).scatter_(0, order, (before * 4 // counts.sum()).clamp(max=3))
    bands = [round(losses[band[targets] == index].mean().item(), 4) for index in range(4)]
    return {"eval_loss": round(losses.mean().item(), 4), "bands": bands}


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _parts(values: list[float], length: int) -> Iterator[list[float]]:
    return (values[start : start + length] for start in range(0, len(values), length))


@functools.cache
def load_rows() -> tuple[Tensor, Tensor]:
    """Training and validation text of the standard library's documentation, int64[rows, CONTEXT]."""
    rows = []
    for split in load_documents().values():
        text = torch.frombuffer(bytearray("\n\n".join(split["text"]).encode()), dtype=torch.uint8).long()
        rows.append(text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT))
    training, validation = rows
    chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))[:VALIDATION_ROWS]
    return training, validation[chosen]


def table(runs: list[dict[str, Any]]) -> str:
    """One line a variant, steps and batch, the best first."""
    rows = []
    for length in sorted({(run["steps"], run["batch"]) for run in runs}):
        mine = [run for run in runs if (run["steps"], run["batch"]) == length]
        rows += [
            [
                f"`{run['variant']}`",
                *length,
                run["seed"],
                f"{run['eval_loss']:.3f}",
                *(f"{loss:.2f}" for loss in run["bands"]),
            ]
            for run in sorted(mine, key=lambda run: run["eval_loss"])
        ]
    columns = ["variant", "steps", "batch", "seed", "eval loss", "most frequent bytes", "frequent", "less", "rare"]
    return markdown_table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--variants", nargs="+", help="variants of your own instead, each in quotes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows a step (default: {BATCH})")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(args.results.read_text()) if args.results.is_file() else []
    groups = [args.variants] if args.variants else [EXPERIMENTS[name] for name in args.experiments]
    for group in [] if args.table else groups:
        length = args.steps, args.seed, args.batch
        done = {run["variant"] for run in runs if (run["steps"], run["seed"], run["batch"]) == length}
        missing = [Variant.parse(text) for text in group if text not in done]
        if missing:
            runs += train(missing, load_rows(), *length)
            atomic_write(args.results, json.dumps(runs) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()

"""Normalises gradients sharded in every way, and compares with whole ones: ``gradient_norm_worker.py``."""

# ruff: noqa: E402
import sys

import torch

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import CollectiveCounter, join, write_result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import hf_sai  # noqa: F401 - registers DTensor's parts
from hf_sai.optim.layout import kind_of
from hf_sai.optim.rules import RULES
from hf_sai.optim.rules.factored import MEAN_SQUARES

RANK, WORLD = join()
MESH = init_device_mesh("cpu", (WORLD,) if WORLD == 2 else (2, 2))
SHAPES = [(5, 4), (1, 9), (4, 3, 2, 2), (7,), (1,)]  # some shard unevenly, some leave ranks empty


def whole_gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) + 0.2 for shape in SHAPES]


def normalize(params, how, state):
    group = {"foreach": None, "fused": None}
    parts = [kind_of(p)(p, group, state[p]) for p in params]
    for p, part, factors in zip(params, parts, RULES[how].factors(parts), strict=True):
        for factor in factors:
            part.grad.mul_(factor)
        if isinstance(p, DTensor):
            p.grad = DTensor.from_local(part.grad, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def largest_error(placements, gradient_placements, how):
    """(largest difference from whole gradients in three steps, all_reduces in the last) of parameters placed so."""
    params, expected = [], []
    for gradient in whole_gradients():
        if any(placement.is_shard() and placement.dim >= gradient.ndim for placement in placements):
            continue
        whole = nn.Parameter(torch.zeros_like(gradient))
        whole.grad = gradient.clone()
        expected.append(whole)
        p = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), MESH, placements))
        if any(placement.is_partial() for placement in gradient_placements):  # each rank holds a summand
            p.grad = DTensor.from_local(gradient / WORLD, MESH, gradient_placements)
        else:
            p.grad = distribute_tensor(gradient, MESH, gradient_placements)
        params.append(p)
    state = {p: {} for p in [*params, *expected]}
    for _ in range(3):  # of the step before, which a running mean divides by something else each time
        normalize(expected, how, state)
        with CollectiveCounter() as collectives:
            normalize(params, how, state)
    pairs = [(p.grad, whole.grad) for p, whole in zip(params, expected, strict=True)]
    for p, whole in zip(params, expected, strict=True):
        pairs += [(state[p][name], state[whole][name]) for name in MEAN_SQUARES if name in state[p]]
    errors = [(sharded.full_tensor() - whole).abs().max().item() for sharded, whole in pairs]
    return max(errors), len(collectives.counts.get("allreduce_", []))


CASES = {
    "rows": ([Shard(0)], [Shard(0)]),
    "columns": ([Shard(1)], [Shard(1)]),
    "replicated": ([Replicate()], [Replicate()]),
    "replicated gradient": ([Shard(0)], [Replicate()]),
    "partial gradient": ([Shard(0)], [Partial()]),
}
if WORLD == 4:  # FSDP2 over tensor parallelism of a layer's inputs, and of its outputs; HSDP
    CASES = {
        "rows and columns": ([Shard(0), Shard(1)], [Shard(0), Shard(1)]),
        "rows twice": ([Shard(0), Shard(0)], [Shard(0), Shard(0)]),
        "replicated rows": ([Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    }

result = {}
for case, placements in CASES.items():
    for how in ("rows", "factored"):
        error, count = largest_error(*placements, how)
        result[f"{case}, {how}"] = {"error": error, "all_reduces": count}
write_result(result)

"""Normalises gradients sharded in every way, and compares with whole ones: ``gradient_norm_worker.py``."""

# ruff: noqa: E402
import sys

import torch

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import CollectiveCounter, join, write_result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_sai.gradient_norm import normalize_gradients_

RANK, WORLD = join()
MESH = init_device_mesh("cpu", (WORLD,))
SHAPES = [(5, 4), (1, 9), (4, 3, 2, 2), (7,), (1,)]  # some shard unevenly, some leave ranks empty


def whole_gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) + 0.2 for shape in SHAPES]


def largest_error(placement, gradient_placement, how):
    """(largest difference from whole gradients, all_reduces) of parameters placed so, with gradients placed so."""
    params, expected = [], []
    for gradient in whole_gradients():
        if placement.is_shard() and placement.dim >= gradient.ndim:
            continue
        whole = nn.Parameter(torch.zeros_like(gradient))
        whole.grad = gradient.clone()
        expected.append(whole)
        p = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), MESH, [placement]))
        if gradient_placement.is_partial():  # each rank holds a summand
            p.grad = DTensor.from_local(gradient / WORLD, MESH, [Partial()])
        else:
            p.grad = distribute_tensor(gradient, MESH, [gradient_placement])
        params.append(p)
    normalize_gradients_(expected, how)
    with CollectiveCounter() as collectives:
        normalize_gradients_(params, how)
    errors = [(p.grad.full_tensor() - whole.grad).abs().max().item() for p, whole in zip(params, expected, strict=True)]
    return max(errors), len(collectives.counts.get("allreduce_", []))


CASES = {
    "rows": (Shard(0), Shard(0)),
    "columns": (Shard(1), Shard(1)),
    "replicated": (Replicate(), Replicate()),
    "replicated gradient": (Shard(0), Replicate()),
    "partial gradient": (Shard(0), Partial()),
}

result = {}
for case, (placement, gradient_placement) in CASES.items():
    for how in ("rows", "tensor"):
        error, count = largest_error(placement, gradient_placement, how)
        result[f"{case}, {how}"] = {"error": error, "all_reduces": count}
write_result(result)

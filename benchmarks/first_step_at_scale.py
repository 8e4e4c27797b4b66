"""What one rank of a large FSDP2 run does in SGD-SaI's first step, without the other ranks and without a GPU.

    python benchmarks/first_step_at_scale.py --size 70b --world_size 1024

Builds the rank's shards of every parameter of a Llama model (shapes from the meta device), random gradients, and a fake
process group that answers at once. It runs three optimizer steps and reports collectives and their bytes, the largest
tensor that the step made, the times, and the memory.
"""

import argparse
import json
import resource
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sai import SGDSaI

SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


class Watch(TorchDispatchMode):
    """Counts collectives and their bytes, and finds the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.collective_bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.startswith("c10d::"):
            self.collectives += 1
            self.collective_bytes += sum(t.numel() * t.element_size() for t in args[0])
        outputs = result if isinstance(result, (tuple, list)) else [result]
        sizes = [t.numel() for t in outputs if isinstance(t, torch.Tensor) and not isinstance(t, DTensor)]
        self.largest = max([self.largest, *sizes])
        return result


def shards_of(size: str, world_size: int) -> list[torch.nn.Parameter]:
    """Rank 0's shards of all parameters, sharded over their first dimension as FSDP2 does, with random gradients."""
    mesh = init_device_mesh("cpu", (world_size,))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 32000, **SIZES[size]}))
    parameters = []
    for whole in model.parameters():
        local = torch.zeros(-(-whole.shape[0] // world_size), *whole.shape[1:])
        layout = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
        parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], **layout))
        parameter.grad = DTensor.from_local(torch.randn_like(local), mesh, [Shard(0)], **layout)
        parameters.append(parameter)
    return parameters


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="70b")
    parser.add_argument("--world_size", type=int, default=1024)
    options = parser.parse_args()

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.world_size)
    parameters = shards_of(options.size, options.world_size)
    optimizer = SGDSaI(parameters, fused=True)
    report = {
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "local_elements": sum(p.to_local().numel() for p in parameters),
        "largest_local_tensor": max(p.to_local().numel() for p in parameters),
        "memory_before_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    for step in ("first", "second", "third"):
        with Watch() as watch:
            start = time.perf_counter()
            optimizer.step()
            seconds = time.perf_counter() - start
        report[step] = {
            "seconds": round(seconds, 3),
            "collectives": watch.collectives,
            "collective_bytes": watch.collective_bytes,
            "largest_tensor_made": watch.largest,
        }
    report["memory_after_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

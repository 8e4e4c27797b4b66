"""The most memory that a training step needs, beside a model of random weights: one process for each optimizer.

    python benchmarks/peak_memory.py gpt2 --tokens 64

A row is the process's largest resident memory in five training steps on one short sequence, less what it had when the
model stood there. Beside it: the bytes of gradients and optimizer state, which is what the optimizer is answerable for.
The rest are activations, temporary tensors and what the libraries load. Linux only: the C library is asked to give
every freed tensor of 64 KiB or more back to the system.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

import torch

from hf_sai import SGDSaI
from hf_sai.memory.skeletons import build_skeleton
from hf_sai.runs.meters import state_bytes
from recipes.common.comparison import markdown_table

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "torch AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-6),
    "SGD-SaI": lambda params: SGDSaI(params, lr=1e-6),
    "SGD-SaI, factored gradient": lambda params: SGDSaI(params, lr=1e-6, update="factored"),
    "SGD-SaI, 8-bit momentum": lambda params: SGDSaI(params, lr=1e-6, momentum_dtype="8bit"),
    "SGD-SaI, gradient release": lambda params: SGDSaI(params, lr=1e-6, gradient_release=True),
    "SGD-SaI, gradient release, 8-bit momentum": lambda params: SGDSaI(
        params, lr=1e-6, gradient_release=True, momentum_dtype="8bit"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a causal language model's name that `hf-sai memory` knows")
    parser.add_argument("--tokens", type=int, default=64, help="length of the sequence (default: 64)")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="OPTIMIZER")
    parser.add_argument("--child", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.model, args.tokens, OPTIMIZERS[args.child])))
        return
    rows = []
    for name in args.only:
        command = [sys.executable, __file__, args.model, "--tokens", str(args.tokens), "--child", name]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        rows.append([name, *(f"{measured[key] / 1e6:,.0f}" for key in ("peak", "gradients", "states"))])
    print(markdown_table(["optimizer", "peak beside the model, MB", "gradients, MB", "optimizer state, MB"], rows))


def measure(model_name: str, tokens: int, build: Callable[[list], torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes: `peak` beside the model, `gradients` that stand after a backward pass, `states` of the optimizer."""
    torch.manual_seed(0)
    model = build_skeleton(model_name).to_empty(device="cpu")
    model.tie_weights()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
        else:
            tensor.zero_()
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    optimizer = build(list(model.parameters()))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak - before, "gradients": gradients, "states": state_bytes(optimizer)}


if __name__ == "__main__":
    main()

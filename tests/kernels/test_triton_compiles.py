"""Triton's compiler takes the kernels: machine code for an H100 is made without one. The interpreter takes more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_sai.kernels import triton_factored, triton_step
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import allocate, momentum_of
from hf_sai.optim.rules import RULES

class NoDevice:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

def compiled(kernel, *args, grid, warmup, **options):
    made = launched(kernel, *args, grid=grid, warmup=True, **options)
    print(kernel.__name__, len(made.asm["cubin"]) > 1000)

driver.set_active(NoDevice())
launched, JITFunction.run = JITFunction.run, compiled

def step(dtype, kept=None, factors=None, **more):
    part = Part(torch.nn.Parameter(torch.ones(128, 96, dtype=dtype)), {"momentum_dtype": kept}, {})
    allocate(part)
    options = {"lr": 0.1, "momentum": 0.9, "ahead": 0.1, "weight_decay": 0.1, "maximize": False, **more}
    options["grad_factors"] = factors
    triton_step.update([part.param], [torch.ones(128, 96, dtype=dtype)], [momentum_of(part)], [1.0], **options)

both = [(torch.ones(128, 1), torch.ones(1, 96))]
one = torch.ones(1)
step(torch.float32)
step(torch.float32, lr=one, grad_scale=one, found_inf=one)
step(torch.float32, "8bit", both)
step(torch.float32, "4bit", both)
step(torch.bfloat16, "4bit", both, stochastic_rounding=True)
step(torch.float16, torch.bfloat16, momentum=0.0)
for shape, dtype in (((128, 96), torch.float32), ((127, 95), torch.bfloat16)):
    part = Part(torch.nn.Parameter(torch.ones(shape)), {"momentum_dtype": None}, {})
    part.grad = torch.ones(shape, dtype=dtype)
    RULES["factored"].allocate(part)
    triton_factored.factors({0: part})
"""


@pytest.mark.longer
@pytest.mark.timeout(300)
def test_the_kernels_compile_for_an_h100(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == ["_step True"] * 6 + ["_add_squares True"] * 2

"""The tiny model under DeepSpeed ZeRO. Imported when the process group is there, which DeepSpeed wants to find."""

import deepspeed
import torch
import torch.distributed as dist
from common import OPTIONS, Late, build, groups_of, late_groups, loss_of, mean, my_batch
from deepspeed.accelerator import get_accelerator
from on_cpu import use_no_deepspeed_kernels

from hf_sai import SGDSaI

use_no_deepspeed_kernels()
deepspeed.init_distributed(verbose=False)


def engine_of(stage, dtype=torch.float32, options=None, clip=0.0, late=False, **zero):
    model = Late() if late else build()
    groups = late_groups(model) if late else groups_of(model)
    optimizer = SGDSaI(groups, **{**OPTIONS, **(options or {})})
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **zero},
    }
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
        if stage == 1:  # another of DeepSpeed's optimizers
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype is torch.float16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 24}
        get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for instructions that torch does without
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine, optimizer


def train(engine, steps):
    """As :func:`common.train`, by the engine's own calls."""
    mine = dist.get_rank(), dist.get_world_size()
    for step in steps:
        engine.backward(loss_of(engine, my_batch(step, *mine)))
        engine.step()
    with torch.no_grad():
        return [mean(loss_of(engine, my_batch(step, *mine))) for step in range(3)]

"""A plain Accelerate loop under DDP and FSDP2: save_state, go on, load_state into new objects, go on again."""

import os
import warnings

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from common import FOLDER, OPTIONS, STEPS, build, groups_of, gsnr_of, join, loss_of, my_batch, write_result

from hf_sai import SGDSaI

warnings.filterwarnings("ignore")
os.environ["ACCELERATE_USE_CPU"] = "true"
RANK, WORLD = join()
original = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """On the CPU accelerate silently turns an FSDP configuration into DDP; tell it that FSDP is meant."""
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = with_fsdp


def run(accelerator, model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, my_batch(step, RANK, WORLD))
        accelerator.backward(loss)
        optimizer.step()
    return loss.item()


def made(accelerator):
    model = build()
    return accelerator.prepare(model, SGDSaI(groups_of(model), **OPTIONS))


results = {}
for name in ("ddp", "fsdp2"):
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if name == "fsdp2" else None)
    model, optimizer = made(accelerator)
    run(accelerator, model, optimizer, range(STEPS // 2))
    accelerator.save_state(str(FOLDER / name))
    uninterrupted = run(accelerator, model, optimizer, range(STEPS // 2, STEPS))
    expected = gsnr_of(optimizer.optimizer)
    accelerator._models.clear()
    accelerator._optimizers.clear()
    model, optimizer = made(accelerator)
    accelerator.load_state(str(FOLDER / name))
    results[name] = {
        "type": accelerator.distributed_type.name,
        "processes": accelerator.num_processes,
        "same_loss": run(accelerator, model, optimizer, range(STEPS // 2, STEPS)) == uninterrupted,
        "same_gsnr": gsnr_of(optimizer.optimizer) == expected and None not in expected.values(),
    }
write_result(results)

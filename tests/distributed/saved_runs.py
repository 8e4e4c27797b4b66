"""The tiny model and its optimizer under an engine, and how that saves and loads them."""

import copy
import functools
import os

import torch
import torch.distributed as dist
from common import DDP_TYPE, DEVICE, OPTIONS, Saver, build, groups_of, shard, tensor_parallel, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel, ShardingStrategy

from hf_sai import SGDSaI


class TorchRun:
    """Model and optimizer under FSDP1 or FSDP2, saved by torch.distributed.checkpoint."""

    def __init__(self, engine):
        rounds = engine.endswith("rounded")
        self.model = build(torch.bfloat16 if rounds else torch.float32)
        self.data = (dist.get_rank(), dist.get_world_size())
        if engine.startswith("fsdp1"):
            options = {"use_orig_params": True, "device_id": torch.device(DEVICE)}
            if "hybrid" in engine:
                mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2))
                options |= {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
            self.model = FullyShardedDataParallel(self.model, **options)
        elif engine == "hsdp":
            shard(self.model, init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "shard")))
        elif engine == "fsdp2_tp":
            mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
            shard(tensor_parallel(self.model, mesh["tp"]), mesh["dp"])
            self.data = (mesh.get_local_rank("dp"), 2)
        elif dist.get_world_size() > 1:
            shard(self.model)
        how = "factored" if engine.endswith("factored") else "published"
        options = {**OPTIONS, "update": how, "stochastic_rounding": rounds}
        self.optimizer = self.sgd_sai = SGDSaI(groups_of(self.model), **options)
        self.saver = Saver(self.model, self.optimizer)
        self.save, self.load = self.saver.save, self.saver.load
        self.save_full, self.load_full = self.saver.save_full, self.saver.load_full

    def train(self, steps):
        return train(self.model, self.optimizer, steps, *self.data)


class AccelerateRun:
    """Model and optimizer under accelerate, saved by its ``save_state``."""

    def __init__(self, engine):
        import on_cpu  # noqa: F401
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # an earlier Accelerator has set it
        version = 1 if "fsdp1" in engine else 2
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            use_orig_params=True if version == 1 else None,
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT" if engine.endswith("fsdp2_full") else "SHARDED_STATE_DICT",
        )
        self.accelerator = Accelerator(cpu=DEVICE == "cpu", fsdp_plugin=None if engine.endswith("ddp") else plugin)
        expected = DDP_TYPE if engine.endswith("ddp") else "FSDP"
        assert self.accelerator.distributed_type.name == expected, self.accelerator.distributed_type
        assert self.accelerator.num_processes == dist.get_world_size()
        model = build()
        self.data = (dist.get_rank(), dist.get_world_size())
        if version == 1:  # which wants the wrapped model's parameters
            for p in (model.odd.row, model.odd.gate):  # with fewer rows than ranks: torch fails to load their states
                p.requires_grad_(False)
            model = self.accelerator.prepare(model)
        self.sgd_sai = SGDSaI(groups_of(model), **OPTIONS, update="factored" if "factored" in engine else "published")
        self.model, self.optimizer = self.accelerator.prepare(model, self.sgd_sai)
        # FSDP1's whole weights crash on the CPU (SIGSEGV in torch 2.13), so that its whole state is saved by itself.
        self.whole = version == 1 and engine.endswith("full")

    def train(self, steps):
        return train(self.model, self.optimizer, steps, *self.data)

    def save(self, folder):
        self.accelerator.save_state(str(folder))
        if self.whole:
            from accelerate.utils.fsdp_utils import save_fsdp_optimizer

            save_fsdp_optimizer(self.whole_plugin(), self.accelerator, self.sgd_sai, self.model, str(folder / "whole"))

    def load(self, folder):
        self.accelerator.load_state(str(folder))
        if self.whole:
            from accelerate.utils.fsdp_utils import load_fsdp_optimizer

            self.sgd_sai.state.clear()
            load_fsdp_optimizer(self.whole_plugin(), self.accelerator, self.sgd_sai, self.model, str(folder / "whole"))

    def whole_plugin(self):
        """As accelerate saves whole states by default, but that what lies on the CPU is not moved there."""
        plugin = copy.copy(self.accelerator.state.fsdp_plugin)
        plugin.state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
        plugin.optim_state_dict_config = FullOptimStateDictConfig(offload_to_cpu=DEVICE != "cpu", rank0_only=True)
        return plugin


class ZeroRun:
    """Model and optimizer under DeepSpeed ZeRO, saved by its engine."""

    def __init__(self, engine):
        import zero

        self.engine, self.sgd_sai = zero.engine_of(int(engine[4]))
        self.train = functools.partial(zero.train, self.engine)

    def save(self, folder):
        self.engine.save_checkpoint(str(folder), tag="state")

    def load(self, folder):
        self.engine.load_checkpoint(str(folder), tag="state")


def make(engine):
    """The tiny model under an engine; see checkpoint_worker.py."""
    kinds = {"accelerate": AccelerateRun, "zero": ZeroRun}
    return next((kind for name, kind in kinds.items() if engine.startswith(name)), TorchRun)(engine)

"""Makes accelerate and DeepSpeed do on the CPU what they are told: import it, or ``on_cpu.py SCRIPT ...``.

Otherwise accelerate silently turns FSDP into DDP, and DeepSpeed first compiles a kernel, for half a minute and behind a
lock in the user's cache that outlives a killed process, at which all later runs would wait for ever.
"""

import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_original, _original_partial = AcceleratorState.__init__, PartialState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        self.device = torch.device("cpu")  # FSDP1 takes cpu:0 for another device
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def _with_gloo(self, cpu=False, **kwargs):
    _original_partial(self, cpu, **{**kwargs, "backend": kwargs.get("backend") or "gloo"})


def use_no_deepspeed_kernels():
    """Let DeepSpeed communicate through gloo alone. Call it before DeepSpeed joins a process group."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


AcceleratorState.__init__ = _with_fsdp
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # set by ``accelerate launch``
    use_no_deepspeed_kernels()
    PartialState.__init__ = _with_gloo  # accelerate finds no backend by itself, and counts one process

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")

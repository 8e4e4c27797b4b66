"""What the workers share: a tiny model with awkward parameters, its data, a reference run, and counting collectives."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sai import SGDSaI, param_groups

STEPS = 20
BATCH = 8
FOLDER = Path(os.environ.get("HF_SAI_TEST_FOLDER", "."))
#: ``cuda``: one GPU per rank and NCCL between them.
DEVICE = os.environ.get("HF_SAI_TEST_DEVICE", "cpu")
#: What accelerate calls plain data parallelism there.
DDP_TYPE = "MULTI_CPU" if DEVICE == "cpu" else "MULTI_GPU"
OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}


class Block(nn.Module):
    """A layer with a low-rank branch whose B starts at zero: A's first gradient is exactly zero, as in LoRA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.lora_a = nn.Linear(width, 3, bias=False)
        self.lora_b = nn.Linear(3, width, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) + self.lora_b(self.lora_a(x))


class Odd(nn.Module):
    """Parameters that shard unevenly or not at all: [1, 9], [3, 7], [5] and a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 9))
        self.matrix = nn.Parameter(torch.randn(3, 7))
        self.vector = nn.Parameter(torch.randn(5))
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x[..., :9] * self.row).sum(-1) + torch.tanh(x[..., :7] @ self.matrix.T).sum(-1)
        return self.gate * (y + (x[..., :5] * self.vector).sum(-1))


class Tiny(nn.Module):
    """Embedding, two blocks, the odd parameters, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.odd = Odd()
        self.head = nn.Linear(12, 23)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * (1 + self.odd(x).tanh().unsqueeze(-1)))


def build(dtype: torch.dtype = torch.float32) -> Tiny:
    """The same model on every rank."""
    torch.manual_seed(0)
    return Tiny().to(DEVICE, dtype)


def tensor_parallel(model: Tiny, mesh: DeviceMesh) -> nn.Module:
    """Column and row parallel layers, and an embedding whose 23 rows two ranks cannot share evenly."""
    plan = {"embed": RowwiseParallel(input_layouts=Replicate())}
    for index in range(len(model.blocks)):
        plan |= {f"blocks.{index}.up": ColwiseParallel(), f"blocks.{index}.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def shard(model: Any, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """FSDP2; with a mesh of two dimensions HSDP."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batch(step: int) -> Tensor:
    """The global batch of a step, int64[BATCH, 10]."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(23, (BATCH, 10), generator=generator).to(DEVICE)


def my_batch(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's part of the global batch."""
    share = BATCH // world_size
    return batch(step)[rank * share : (rank + 1) * share]


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def groups_of(model: nn.Module, update: str | None = None) -> list[dict[str, Any]]:
    """Two groups, with and without decay, as Trainer makes them; for the orthogonal rule also hidden matrices."""
    if update == "orthogonal":
        return param_groups(model, lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"], update=update)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if not name.endswith(("bias", "norm.weight", "gate"))]
    rest = [(name, p) for name, p in named if name.endswith(("bias", "norm.weight", "gate"))]
    return [
        {"params": matrices, "name": "decay", "weight_decay": OPTIONS["weight_decay"]},
        {"params": rest, "name": "no_decay", "weight_decay": 0.0},
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world_size: int = 1,
    clip: float = 0.0,
) -> list[float]:
    """Train on this rank's part of each global batch; returns the trained model's losses on three global batches."""
    losses = []
    if isinstance(optimizer, SGDSaI):
        optimizer.train()
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, my_batch(step, rank, world_size)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    if isinstance(optimizer, SGDSaI):
        optimizer.eval()
    with torch.no_grad():
        for step in range(3):
            losses.append(loss_of(model, my_batch(step, rank, world_size)))
    return [mean(loss) for loss in losses]


def mean(value: Tensor) -> float:
    """The mean over all ranks; those that work on the same data say the same."""
    value = value.detach().clone().double()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def reference(
    steps: int = STEPS, clip: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """g-SNR and losses of the same training in one process."""
    model = build(dtype)
    optimizer = SGDSaI(groups_of(model, options.get("update")), **{**OPTIONS, **options})
    losses = train(model, optimizer, range(steps), clip=clip)
    return {"gsnr": gsnr_of(optimizer), "losses": losses}


def gsnr_of(optimizer: SGDSaI) -> dict[str, float | None]:
    """Name -> g-SNR, as the report has it, without the prefixes of wrappers."""
    return {
        row.name.replace("_fsdp_wrapped_module.", "").replace("module.", ""): row.gsnr
        for row in optimizer.gsnr_report()
    }


def same_placements(optimizer: SGDSaI) -> bool:
    """Whether every momentum buffer is distributed as its parameter is."""
    return all(
        type(buffer := optimizer.state[p]["momentum_buffer"]) is DTensor
        and buffer.placements == p.placements
        and buffer.to_local().shape == p.to_local().shape
        for p in params_of(optimizer)
        if isinstance(p, DTensor)
    )


def same_on_all_ranks(whole: Tensor) -> bool:
    """Whether a tensor is equal bit for bit on all ranks."""
    gathered = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, whole.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)


def params_of(optimizer: SGDSaI) -> list[Tensor]:
    """The optimizer's parameters; after evaluation FSDP2 leaves the model with others, unsharded."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def largest_difference(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of g-SNR and of losses. Both must name the same, measured parameters."""
    assert got["gsnr"].keys() == expected["gsnr"].keys(), got["gsnr"].keys() ^ expected["gsnr"].keys()
    assert None not in expected["gsnr"].values()
    assert None not in got["gsnr"].values(), got["gsnr"]
    return {
        "gsnr": max(abs(got["gsnr"][name] / value - 1) for name, value in expected["gsnr"].items()),
        "loss": max(abs(a / b - 1) for a, b in zip(got["losses"], expected["losses"], strict=True)),
    }


class Shift(nn.Module):
    """A vector to add."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(24))

    def forward(self) -> Tensor:
        return self.vector.clone()


class Late(nn.Module):
    """A layer, and a vector whose gradient is zero for two steps, then non-zero on the last rank's part alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(24, 24)
        self.late = Shift()
        self.to(DEVICE)

    def forward(self, step: int, rank: int, world_size: int) -> Tensor:
        x = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank].to(DEVICE)
        reached = torch.arange(24, device=DEVICE) >= {0: 24, 1: 24, 2: 21}.get(step, 0)
        return torch.tanh(self.layer(x) + reached * self.late()).square().mean()


def late_groups(model: Late) -> list[dict[str, Any]]:
    """The vector alone in its group, so that flattening engines split it between the ranks."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if ("vector" in name) == is_late], "name": str(is_late)}
        for is_late in (True, False)
    ]


def train_late(
    model: Callable[..., Tensor],
    optimizer: SGDSaI,
    advance: Callable[[Tensor], Any],
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Six steps; ``measured`` says after which of them the vector's g-SNR is known."""
    losses, measured = [], []
    for step in range(6):
        loss = model(step, rank, world_size)
        advance(loss)
        losses.append(mean(loss) if world_size > 1 else loss.item())
        measured.append(gsnr_of(optimizer)["late.vector"] is not None)
    return {"gsnr": gsnr_of(optimizer), "losses": losses, "measured": measured}


def advance(optimizer: SGDSaI) -> Callable[[Tensor], None]:
    """Backward and step, where no engine has its own."""

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def compare_late(got: dict[str, Any]) -> dict[str, Any]:
    """A distributed :func:`train_late` against one process."""
    model = Late()
    optimizer = SGDSaI(late_groups(model), **OPTIONS)
    expected = train_late(model, optimizer, advance(optimizer))
    assert expected["measured"] == [False, False, True, True, True, True]
    return {**largest_difference(got, expected), "same_step": got["measured"] == expected["measured"]}


class Saver:
    """Saves and loads a model and its optimizer by torch.distributed.checkpoint, sharded and full."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.both = model, optimizer
        # FSDP1 gives nested optimizer states whose groups only some ranks have, which dcp.load cannot match; and with
        # cpu_offload its full state crashes on the CPU (SIGSEGV in torch 2.13, with AdamW too).
        fsdp1 = isinstance(model, FullyShardedDataParallel)
        self.sharded = StateDictOptions(flatten_optimizer_state_dict=fsdp1)
        self.full = StateDictOptions(full_state_dict=True, cpu_offload=not fsdp1)

    def save(self, folder: Path) -> None:
        weights, states = get_state_dict(*self.both, options=self.sharded)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=str(folder))

    def load(self, folder: Path) -> None:
        weights, states = get_state_dict(*self.both, options=self.sharded)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=str(folder))
        set_state_dict(*self.both, model_state_dict=weights, optim_state_dict=states, options=self.sharded)

    def save_full(self, file: Path, **more: Any) -> None:
        """In one file, with whatever else is to be in there."""
        weights, states = get_state_dict(*self.both, options=self.full)
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": states, **more}, file)
        dist.barrier()

    def load_full(self, file: Path) -> None:
        whole = torch.load(file, weights_only=True)
        states = {"model_state_dict": whole["model"], "optim_state_dict": whole["optimizer"]}
        set_state_dict(*self.both, **states, options=StateDictOptions(full_state_dict=True))


class CollectiveCounter(TorchDispatchMode):
    """Notes the number of elements of each collective, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        namespace, name = function._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional", "c10d_functional") and "wait" not in name:
            sent = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.counts.setdefault(name, []).append(sum(t.numel() for t in sent if isinstance(t, Tensor)))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(optimizer: torch.optim.Optimizer, per_step: list[dict[str, list[int]]]) -> Iterator[None]:
    """Appends to ``per_step`` the sizes of the collectives of each ``optimizer.step``, and of nothing else."""
    original = optimizer.step

    def step(*args, **kwargs):  # type: ignore[no-untyped-def]
        with CollectiveCounter() as counter:
            result = original(*args, **kwargs)
        per_step.append(counter.counts)
        return result

    optimizer.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        optimizer.step = original  # type: ignore[method-assign]


def join(alone: bool = False) -> tuple[int, int]:
    """Join the process group through a file; returns rank and world size, which is 1 only if ``alone`` allows it."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(FOLDER / "rendezvous"), world_size)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if DEVICE == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    assert dist.get_world_size() == world_size >= (1 if alone else 2)
    return rank, world_size


def write_result(result: dict[str, Any]) -> None:
    """Leave this rank's result for the test, then the process group, and end the process: a worker's last act.

    The interpreter is not let end by itself: after its last line gloo's threads abort one process in forty under DDP on
    busy cores ("terminate called without an active exception", torch 2.13), although the group has been destroyed.
    """
    (FOLDER / f"result_{os.environ['RANK']}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

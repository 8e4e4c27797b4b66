"""Trains the tiny model under torch's engines and compares with one process: ``engines_worker.py MODE [MODE ...]``."""

# ruff: noqa: E402
import contextlib
import logging
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import (
    DEVICE,
    OPTIONS,
    STEPS,
    Late,
    Shift,
    advance,
    build,
    compare_late,
    counting,
    groups_of,
    gsnr_of,
    join,
    largest_difference,
    late_groups,
    loss_of,
    my_batch,
    params_of,
    reference,
    same_on_all_ranks,
    same_placements,
    shard,
    tensor_parallel,
    train,
    train_late,
    write_result,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from hf_sai import SGDSaI
from hf_sai.distributed import copies, exchange
from hf_sai.distributed.ddp import ASKED
from hf_sai.groups.param_groups import no_decay_names
from hf_sai.optim.layout import whole_shapes as full_shapes
from hf_sai.optim.rules import orthogonal

warnings.filterwarnings("ignore")
RANK, WORLD = join()
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make(mode, **options):
    """(model, data-parallel rank, data-parallel size)"""
    model = build(options.pop("dtype", torch.float32))
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model), RANK, WORLD
    if mode == "fsdp2":
        return shard(model, **options), RANK, WORLD
    if mode == "hsdp":
        return shard(model, init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "shard"))), RANK, WORLD
    if mode == "tp":
        return tensor_parallel(model, init_device_mesh(DEVICE, (WORLD,))), 0, 1
    if mode == "fsdp2_tp":
        mesh = init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "tp"))
        return shard(tensor_parallel(model, mesh["tp"]), mesh["dp"]), mesh.get_local_rank("dp"), 2
    if mode in ("fsdp1", "fsdp1_hybrid"):
        wrap = {nn.Linear} if options.get("leaves") else {type(model.blocks[0])}
        hybrid = {
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
            "device_mesh": init_device_mesh(DEVICE, (2, WORLD // 2)),
        }
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device(DEVICE),
            auto_wrap_policy=ModuleWrapPolicy(wrap),
            **(hybrid if mode == "fsdp1_hybrid" else {}),
        )
        return model, RANK, WORLD
    raise ValueError(mode)


def train_and_compare(mode, **options):
    """The run, its differences from one process, and its collectives."""
    names = ("fused", "foreach", "normalize", "nesterov", "update")
    optimizer_options = {key: options.pop(key) for key in names if key in options}
    model, rank, size = make(mode, **options)
    groups = groups_of(model, optimizer_options.get("update"))
    optimizer = SGDSaI(groups, **{**OPTIONS, **optimizer_options})
    per_step = []
    with counting(optimizer, per_step):
        losses = train(model, optimizer, range(STEPS), rank, size)
    got = {"gsnr": gsnr_of(optimizer), "losses": losses}
    return {
        **largest_difference(got, reference(**optimizer_options)),
        "collectives": per_step,
        "same_placements": same_placements(optimizer),
        "sharded": sum(isinstance(p, DTensor) for p in params_of(optimizer)),
        "empty": sum((p.to_local() if isinstance(p, DTensor) else p).numel() == 0 for p in params_of(optimizer)),
    }


@contextlib.contextmanager
def sharing(asked="1"):
    """Also these small matrices are worth sharing, under DDP if asked."""
    worth, copies.WORTH = copies.WORTH, 1
    os.environ[ASKED] = asked
    try:
        yield
    finally:
        copies.WORTH = worth
        del os.environ[ASKED]


def shared_orthogonal(mode):
    """The same, but that these small matrices are shared; whether replicas are equal bit for bit."""
    with sharing():
        model, rank, size = make(mode)
        optimizer = SGDSaI(groups_of(model, "orthogonal"), **OPTIONS, update="orthogonal")
        per_step = []
        with counting(optimizer, per_step):
            losses = train(model, optimizer, range(STEPS), rank, size)
        got = {"gsnr": gsnr_of(optimizer), "losses": losses}
        tensors = [
            *params_of(optimizer),
            *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)),
        ]
        wholes = [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]
        result = {**largest_difference(got, reference(update="orthogonal")), "collectives": per_step}
        return {**result, "same": all(map(same_on_all_ranks, wholes)), "worked_on": worked_on(optimizer)}


def in_rounds(mode):
    """The same in rounds of one matrix a rank, and in which order a step brings them together and hands them out."""
    order = []

    def noted(name, method):
        def noting(*args):
            order.append(name)
            return method(*args)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "ROOM", 1)
        for name in ("collect", "hand_out"):
            patch.setattr(exchange.Exchange, name, noted(name, getattr(exchange.Exchange, name)))
        result = train_and_compare(mode, update="orthogonal")
    return {**result, "order": order[: len(order) // STEPS]}


@contextlib.contextmanager
def listening():
    """What hf_sai warns of."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("hf_sai").addHandler(handler)
    yield heard
    logging.getLogger("hf_sai").removeHandler(handler)


def disagree():
    """Each rank optimizes another matrix of a DDP model, or has gradients of its own: nobody waits for anybody."""
    per_step, unasked = [], []
    with sharing():
        with listening() as heard:
            model, rank, size = make("ddp")
            own = model.module.blocks[RANK].up.weight
            optimizer = SGDSaI([{"params": [own], "update": "orthogonal", "matrices": "linear"}], **OPTIONS)
            before = own.detach().clone()
            train(model, optimizer, range(2), rank, size)
        local, *_ = make("ddp")
        with local.no_sync():
            optimizer = SGDSaI(groups_of(local, "orthogonal"), **OPTIONS)
            with counting(optimizer, per_step):
                train(local, optimizer, range(2), rank, size)
    with sharing(asked=""):
        model, rank, size = make("ddp")
        optimizer = SGDSaI(groups_of(model, "orthogonal"), **OPTIONS)
        with counting(optimizer, unasked):
            train(model, optimizer, range(2), rank, size)
    return {"heard": heard, "moved": not own.equal(before), "without_sync": per_step, "unasked": unasked}


def different_states():
    """FSDP1, of which one group has running means and the other none."""
    model, rank, size = make("fsdp1")
    groups = groups_of(model)
    groups[0]["update"] = "factored"
    with listening() as heard:
        train(model, SGDSaI(groups, **OPTIONS), range(1), rank, size)
    return {"heard": heard}


def worked_on(optimizer):
    """How many hidden matrices this rank makes orthogonal in one more step."""
    counted, made = [], orthogonal.newton_schulz
    orthogonal.newton_schulz = lambda matrices: counted.append(len(matrices)) or made(matrices)
    try:
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        orthogonal.newton_schulz = made
    return sum(counted)


def bf16(mode, dtype=torch.bfloat16, **options):
    """In bf16 the g-SNR must be that of the bf16 gradient, measured exactly, on every rank alike."""
    model, rank, size = make(mode, dtype=dtype, **options)
    optimizer = SGDSaI(groups_of(model), **OPTIONS)
    loss_of(model, my_batch(0, rank, size)).backward()
    whole = whole_gradients(model)
    optimizer.step()
    errors = []
    for name, gsnr in gsnr_of(optimizer).items():
        gradient = whole[name]
        if gsnr is not None and gradient.numel() > 1:
            errors.append(abs(gsnr * (gradient.std().item() + 1e-8) / gradient.norm().item() - 1))
    losses = train(model, optimizer, range(1, STEPS), rank, size)
    expected = reference(dtype=torch.bfloat16)["losses"]
    worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    return {"gsnr": max(errors), "measured": len(errors), "loss": worst}


def whole_gradients(model):
    """Name -> gradient, float64."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {name: p.grad.double() for name, p in named(model)}
    return {name: (g.full_tensor() if isinstance(g := p.grad, DTensor) else g).double() for name, p in named(model)}


def named(model):
    for name, p in model.named_parameters():
        yield name.replace("_fsdp_wrapped_module.", "").replace("module.", ""), p


def bf16_momentum(mode):
    """Momentum in bfloat16 of float32 parameters: sharded as they are, near one process with the same."""
    model, rank, size = make(mode)
    optimizer = SGDSaI(groups_of(model), **OPTIONS, momentum_dtype=torch.bfloat16)
    losses = train(model, optimizer, range(STEPS), rank, size)
    got = {"gsnr": gsnr_of(optimizer), "losses": losses}
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    return {
        **largest_difference(got, reference(momentum_dtype=torch.bfloat16)),
        "same_placements": same_placements(optimizer),
        "dtypes": sorted({str(buffer.dtype) for buffer in buffers}),
    }


def rounding(mode):
    """Stochastic rounding with another random state on each rank; replicas must stay equal all the same."""
    model, rank, size = make(mode, dtype=torch.bfloat16)
    torch.manual_seed(RANK)
    optimizer = SGDSaI(groups_of(model), **OPTIONS, stochastic_rounding=True)
    train(model, optimizer, range(3), rank, size)
    drawn, replicas = torch.rand(1).item(), []
    if mode.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model):
            replicas = [same_on_all_ranks(p.detach()) for p in model.parameters()]
    else:
        for p in params_of(optimizer):
            replicas.append(same_on_all_ranks(p.full_tensor() if isinstance(p, DTensor) else p.detach()))
    return {"same": all(replicas), "drawn": drawn}


def slices_are_rounded_apart():
    """Weights and gradients that are all the same: which are rounded up is by the random numbers alone."""
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device=DEVICE)
    nn.init.constant_(model.weight, 0.75)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(DEVICE))
    gsnr, half_of_a_step = 10 * 64, 2**-9
    optimizer = SGDSaI(model.named_parameters(), lr=half_of_a_step / gsnr, stochastic_rounding=True)
    (p,) = model.parameters()
    p.grad = torch.ones_like(p)
    optimizer.step()
    moved = (p.detach() != 0.75).float()
    pieces = [torch.empty_like(moved) for _ in range(WORLD)]
    dist.all_gather(pieces, moved)
    return {"moved": [piece.mean().item() for piece in pieces], "alike": (pieces[0] == pieces[1]).float().mean().item()}


def late(mode):
    """A gradient that is zero at first, then non-zero on one rank's shard alone."""
    model = Late()
    if mode == "fsdp2":
        fully_shard(model.late)
        fully_shard(model)
    elif mode == "fsdp1":
        policy, device = ModuleWrapPolicy({Shift, nn.Linear}), torch.device(DEVICE)
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=device, auto_wrap_policy=policy)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = SGDSaI(late_groups(model), **OPTIONS)
    return compare_late(train_late(model, optimizer, advance(optimizer), RANK, WORLD))


def whole_shapes(mode):
    """Grouping sees the shapes that the parameters had before the engine cut them."""
    model, plain = make(mode)[0], build()
    names = sorted(name.replace("_fsdp_wrapped_module.", "") for name in no_decay_names(model))
    return {
        "names": names == sorted(no_decay_names(plain)),
        "shapes": full_shapes(model.parameters()) == [p.shape for p in plain.parameters()],
        "cut": sum(p.shape != q.shape for p, q in zip(model.parameters(), plain.parameters(), strict=True)),
    }


def fsdp1_refused():
    """What is not done for slices, before anything is updated."""
    model, rank, size = make("fsdp1")
    optimizer = SGDSaI(groups_of(model, "orthogonal"), **OPTIONS)
    before = [p.detach().clone() for p in params_of(optimizer)]
    try:
        train(model, optimizer, range(1), rank, size)
    except ValueError as error:
        message = str(error)
    assert all(torch.equal(*pair) for pair in zip(before, params_of(optimizer), strict=True))
    return {"message": message}


def late_and_broken():
    """A gradient that is non-zero, then one that is NaN, on one rank alone: all ranks decide alike."""
    model, rank, _ = make("fsdp2")
    optimizer = SGDSaI(groups_of(model), **OPTIONS)
    parameter = model.blocks[0].up.weight
    history = []
    for value in (0.0, float("nan"), 2.0):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if rank == WORLD - 1:
            parameter.grad.to_local().fill_(value)
            if value == 2.0:
                parameter.grad.to_local().view(-1)[0] = 5.0
        optimizer.step()
        history.append((optimizer.state[parameter]["gsnr"], bool(parameter.to_local().isfinite().all())))
    return {"history": history}


def broken_orthogonal():
    """A gradient that is NaN in one rank's shard of a hidden matrix: the whole matrix goes on by its momentum."""
    model, rank, size = make("fsdp2")
    optimizer = SGDSaI(groups_of(model, "orthogonal"), **OPTIONS, update="orthogonal")
    train(model, optimizer, range(2), rank, size)
    optimizer.zero_grad()
    loss_of(model, my_batch(2, rank, size)).backward()
    p = next(p for group in optimizer.param_groups if "matrices" in group for p in group["params"])
    if rank == WORLD - 1:
        p.grad.to_local().view(-1)[0] = float("nan")
    before, momentum = p.to_local().clone(), optimizer.state[p]["momentum_buffer"].to_local().clone()
    optimizer.step()
    kept = torch.equal(momentum, optimizer.state[p]["momentum_buffer"].to_local())
    return {"finite": bool(p.to_local().isfinite().all()), "moved": not torch.equal(before, p.to_local()), "kept": kept}


def flat_parameters_refused():
    model = FullyShardedDataParallel(build(), use_orig_params=False, device_id=torch.device(DEVICE))
    try:
        SGDSaI(model.parameters())
    except ValueError as error:
        message = str(error)
    optimizer = SGDSaI(build().parameters())
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as accelerate does after wrapping
    loss_of(model, my_batch(0, RANK, WORLD)).backward()
    before = next(model.parameters()).detach().clone()
    try:
        optimizer.step()
    except ValueError as error:
        return {"made": message, "stepped": str(error), "same": torch.equal(before, next(model.parameters()))}


def scaler(mode):
    """fp16 scaling with an overflow on the first two steps: skipped on all ranks, then the same g-SNR."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model, rank, size = make(mode)
    optimizer = SGDSaI(groups_of(model), **OPTIONS, fused=True)
    scale = {"init_scale": 2.0**10, "device": DEVICE}
    grad_scaler = ShardedGradScaler(**scale) if mode == "fsdp1" else torch.amp.GradScaler(**scale)
    before = [p.detach().clone() for p in model.parameters()]
    untouched = []
    for attempt in range(STEPS + 2):
        optimizer.zero_grad()
        loss = loss_of(model, my_batch(max(attempt - 2, 0), rank, size))
        grad_scaler.scale(loss).backward()
        if attempt < 2 and rank == 0:
            gradient = next(p.grad for p in model.parameters() if p.grad is not None and p.grad.numel() > 0)
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).view(-1)[0] = float("inf")
        if attempt < 2 and mode == "ddp":  # DDP would have averaged the infinity on all ranks
            next(model.parameters()).grad.view(-1)[0] = float("inf")
        grad_scaler.step(optimizer)
        grad_scaler.update()
        if attempt < 2:
            pairs = zip(before, model.parameters(), strict=True)
            untouched.append(all(bool((a == p).all()) for a, p in pairs))
    losses = train(model, optimizer, range(0), rank, size)
    got = {"gsnr": gsnr_of(optimizer), "losses": losses}
    return {**largest_difference(got, reference()), "untouched": untouched, "scale": grad_scaler.get_scale()}


CHECKS = {
    **{f"bf16_{mode}": (lambda mode=mode: bf16(mode)) for mode in ("ddp", "fsdp2", "tp", "fsdp1", "hsdp", "fsdp2_tp")},
    **{f"bf16_momentum_{mode}": (lambda mode=mode: bf16_momentum(mode)) for mode in ("fsdp2", "tp", "hsdp", "fsdp1")},
    **{f"rounding_{mode}": (lambda mode=mode: rounding(mode)) for mode in ("ddp", "tp", "hsdp", "fsdp1_hybrid")},
    "slices_are_rounded_apart": slices_are_rounded_apart,
    "bf16_mixed": lambda: bf16("fsdp2", dtype=torch.float32, mp_policy=MIXED),
    "late_and_broken": late_and_broken,
    "broken_orthogonal": broken_orthogonal,
    "late_ddp": lambda: late("ddp"),
    "late_fsdp2": lambda: late("fsdp2"),
    "late_fsdp1": lambda: late("fsdp1"),
    "shapes_fsdp1": lambda: whole_shapes("fsdp1"),
    "shapes_fsdp2": lambda: whole_shapes("fsdp2"),
    "fsdp1_refused": fsdp1_refused,
    "fsdp2_offload": lambda: train_and_compare("fsdp2", offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "flat_parameters_refused": flat_parameters_refused,
    "scaler_ddp": lambda: scaler("ddp"),
    "scaler_fsdp2": lambda: scaler("fsdp2"),
    "scaler_fsdp1": lambda: scaler("fsdp1"),
    "fsdp2_fused": lambda: train_and_compare("fsdp2", fused=True),
    "tp_fused": lambda: train_and_compare("tp", fused=True),
    "hsdp_fused": lambda: train_and_compare("hsdp", fused=True),
    "fsdp2_foreach": lambda: train_and_compare("fsdp2", foreach=True),
    "fsdp2_normalize": lambda: train_and_compare("fsdp2", normalize=True),
    **{
        f"{mode}_nesterov": (lambda mode=mode: train_and_compare(mode, nesterov=True, update="factored"))
        for mode in ("ddp", "fsdp2", "tp", "hsdp", "fsdp1")
    },
    "fsdp1_leaves": lambda: train_and_compare("fsdp1", leaves=True),
    "fsdp1_fused": lambda: train_and_compare("fsdp1", fused=True),
    **{
        f"{mode}_orthogonal": (lambda mode=mode: train_and_compare(mode, update="orthogonal"))
        for mode in ("ddp", "fsdp2", "tp", "hsdp", "fsdp2_tp")
    },
    **{f"{mode}_shared": (lambda mode=mode: shared_orthogonal(mode)) for mode in ("ddp", "hsdp")},
    **{f"{mode}_rounds": (lambda mode=mode: in_rounds(mode)) for mode in ("fsdp2", "fsdp2_tp")},
    "disagree": disagree,
    "different_states": different_states,
    **{
        f"{mode}_averaged": (lambda mode=mode: train_and_compare(mode, update="averaged"))
        for mode in ("ddp", "fsdp2", "tp", "hsdp", "fsdp2_tp")
    },
    "fsdp1_factored": lambda: train_and_compare("fsdp1", update="factored"),
    "fsdp1_rows": lambda: train_and_compare("fsdp1", update="rows"),
    "fsdp1_leaves_factored": lambda: train_and_compare("fsdp1", leaves=True, update="factored"),
    "fsdp1_hybrid_factored": lambda: train_and_compare("fsdp1_hybrid", update="factored"),
    "fsdp1_normalize": lambda: train_and_compare("fsdp1", normalize=True),
}

torch.manual_seed(0)
results = {"world_size": dist.get_world_size(), "backend": dist.get_backend()}
for name in sys.argv[1:]:
    results[name] = CHECKS[name]() if name in CHECKS else train_and_compare(name)
write_result(results)

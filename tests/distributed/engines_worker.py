"""Trains the tiny model under torch's engines and compares with one process: ``engines_worker.py MODE [MODE ...]``."""

import sys
import warnings

import torch
import torch.distributed as dist
from common import (
    FOLDER,
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
    reference,
    train,
    train_late,
    write_result,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_sai import SGDSaI
from hf_sai.groups import no_decay_names
from hf_sai.sharding import full_shapes

warnings.filterwarnings("ignore")
RANK, WORLD = join()


def tensor_parallel(model, mesh):
    """Column and row parallel layers, and an embedding whose 23 rows two ranks cannot share evenly."""
    plan = {"embed": RowwiseParallel(input_layouts=Replicate())}
    for index in range(len(model.blocks)):
        plan |= {f"blocks.{index}.up": ColwiseParallel(), f"blocks.{index}.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def shard(model, mesh=None, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def make(mode, **options):
    """(model, data-parallel rank, data-parallel size)"""
    model = build(options.pop("dtype", torch.float32))
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model), RANK, WORLD
    if mode == "fsdp2":
        return shard(model, **options), RANK, WORLD
    if mode == "hsdp":
        return shard(model, init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("dp", "shard"))), RANK, WORLD
    if mode == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (WORLD,))), 0, 1
    if mode == "fsdp2_tp":
        mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("dp", "tp"))
        return shard(tensor_parallel(model, mesh["tp"]), mesh["dp"]), mesh.get_local_rank("dp"), 2
    if mode == "fsdp1":
        wrap = {nn.Linear} if options.get("leaves") else {type(model.blocks[0])}
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy(wrap),
        )
        return model, RANK, WORLD
    raise ValueError(mode)


def same_placements(optimizer):
    """Whether every momentum buffer is distributed as its parameter is."""
    return all(
        type(buffer := optimizer.state[p]["momentum_buffer"]) is DTensor
        and buffer.placements == p.placements
        and buffer.to_local().shape == p.to_local().shape
        for p in params_of(optimizer)
        if isinstance(p, DTensor)
    )


def params_of(optimizer):
    """The optimizer's parameters; after evaluation FSDP2 leaves the model with others, unsharded."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train_and_compare(mode, **options):
    """The run, its differences from one process, and its collectives."""
    optimizer_options = {key: options.pop(key) for key in ("fused", "foreach", "normalize") if key in options}
    model, rank, size = make(mode, **options)
    optimizer = SGDSaI(groups_of(model), **{**OPTIONS, **optimizer_options})
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


def bf16():
    """In bf16 the g-SNR must be that of the bf16 gradient, measured exactly, on every rank alike."""
    model, rank, size = make("fsdp2", mp_policy=MixedPrecisionPolicy(), dtype=torch.bfloat16)
    optimizer = SGDSaI(groups_of(model), **OPTIONS)
    loss_of(model, my_batch(0, rank, size)).backward()
    whole = {name: p.grad.full_tensor().double() for name, p in model.named_parameters()}
    optimizer.step()
    errors = []
    for name, gsnr in gsnr_of(optimizer).items():
        gradient = whole[name]
        if gsnr is not None and gradient.numel() > 1:
            errors.append(abs(gsnr * (gradient.std().item() + 1e-8) / gradient.norm().item() - 1))
    return {"gsnr": max(errors), "measured": len(errors)}


def late(mode):
    """A gradient that is zero at first, then non-zero on one rank's shard alone."""
    model = Late()
    if mode == "fsdp2":
        fully_shard(model.late)
        fully_shard(model)
    elif mode == "fsdp1":
        policy, device = ModuleWrapPolicy({Shift, nn.Linear}), torch.device("cpu")
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


def low_bit_refused():
    """The kinds of momentum that are not done for pieces of parameters."""
    model, rank, size = make("fsdp1")
    messages = []
    for option in ({"momentum_dtype": torch.bfloat16}, {"momentum_dtype": "8bit"}, {"stochastic_rounding": True}):
        optimizer = SGDSaI(groups_of(model), **OPTIONS, **option)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            train(model, optimizer, range(1), rank, size)
        except ValueError as error:
            messages.append(str(error))
        assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    return {"messages": messages}


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


def flat_parameters_refused():
    model = FullyShardedDataParallel(build(), use_orig_params=False, device_id=torch.device("cpu"))
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
    scale = {"init_scale": 2.0**10, "device": "cpu"}
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


def hf_tp():
    """transformers' own tensor parallelism, where the embedding is sharded and its gradient replicated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = FOLDER / "llama"
    if RANK == 0:
        LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=32, **sizes)).save_pretrained(folder)
    dist.barrier()
    models = LlamaForCausalLM.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    runs = []
    for model in models:
        optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
        for step in range(STEPS):
            tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
        runs.append({"gsnr": gsnr_of(optimizer), "losses": [loss.item()]})
    return {
        **largest_difference(runs[1], runs[0]),
        "same_placements": same_placements(optimizer),
        "sharded": sum(isinstance(p, DTensor) for p in params_of(optimizer)),
    }


CHECKS = {
    "hf_tp": hf_tp,
    "bf16": bf16,
    "late_and_broken": late_and_broken,
    "late_ddp": lambda: late("ddp"),
    "late_fsdp2": lambda: late("fsdp2"),
    "late_fsdp1": lambda: late("fsdp1"),
    "shapes_fsdp1": lambda: whole_shapes("fsdp1"),
    "shapes_fsdp2": lambda: whole_shapes("fsdp2"),
    "low_bit_refused": low_bit_refused,
    "fsdp2_offload": lambda: train_and_compare("fsdp2", offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "flat_parameters_refused": flat_parameters_refused,
    "scaler_ddp": lambda: scaler("ddp"),
    "scaler_fsdp2": lambda: scaler("fsdp2"),
    "scaler_fsdp1": lambda: scaler("fsdp1"),
    "fsdp2_fused": lambda: train_and_compare("fsdp2", fused=True),
    "fsdp2_foreach": lambda: train_and_compare("fsdp2", foreach=True),
    "fsdp2_normalize": lambda: train_and_compare("fsdp2", normalize=True),
    "fsdp1_leaves": lambda: train_and_compare("fsdp1", leaves=True),
    "fsdp1_fused": lambda: train_and_compare("fsdp1", fused=True),
    "fsdp1_normalize": lambda: train_and_compare("fsdp1", normalize=True),
}

torch.manual_seed(0)
results = {"world_size": dist.get_world_size(), "backend": dist.get_backend()}
for name in sys.argv[1:]:
    results[name] = CHECKS[name]() if name in CHECKS else train_and_compare(name)
write_result(results)

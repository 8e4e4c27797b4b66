"""Trains the tiny model under DeepSpeed ZeRO: ``zero_worker.py CHECK [CHECK ...]``."""

# ruff: noqa: E402
import os
import sys
import warnings

import torch
import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import (
    DEVICE,
    FOLDER,
    OPTIONS,
    STEPS,
    build,
    compare_late,
    counting,
    groups_of,
    gsnr_of,
    join,
    largest_difference,
    loss_of,
    mean,
    my_batch,
    reference,
    train_late,
    write_result,
)

from hf_sai import SGDSaI
from hf_sai.groups.param_groups import no_decay_names
from hf_sai.optim import momentum as momenta
from hf_sai.optim.layout import whole_shapes as full_shapes

warnings.filterwarnings("ignore")
RANK, WORLD = join()
import deepspeed
from zero import engine_of, train


def train_and_compare(stage, options=None, clip=0.0, **zero):
    engine, optimizer = engine_of(stage, options=options, clip=clip, **zero)
    per_step = []
    with counting(optimizer, per_step):
        losses = train(engine, range(STEPS))
    calls = len(per_step) // STEPS  # DeepSpeed calls step once per flat tensor
    got = {"gsnr": gsnr_of(optimizer), "losses": losses}
    return {
        "type": type(engine.optimizer).__name__,
        **largest_difference(got, reference(clip=clip, **(options or {}))),
        "flats": calls,
        "collectives": [
            [call for counts in per_step[i * calls : (i + 1) * calls] for call in counts.items()] for i in range(STEPS)
        ],
    }


def half(stage, dtype):
    """Half precision: the g-SNR that the ranks agree on is near that of float32, and the loss falls."""
    engine, optimizer = engine_of(stage, dtype)
    before = train(engine, range(0))
    after = train(engine, range(STEPS))
    got, expected = gsnr_of(optimizer), reference()["gsnr"]
    assert got.keys() == expected.keys()
    return {
        "type": type(engine.optimizer).__name__,
        "gsnr": max(abs(got[name] / value - 1) for name, value in expected.items()),
        "falls": after[0] < before[0],
        "values": got,
        "skipped": engine.skipped_steps,
    }


def low_bit(stage, kind, **more):
    """Momenta in blocks of this model's small tensors, most of which no rank has whole, and one in bfloat16."""
    most, momenta.MIN_QUANTIZED = momenta.MIN_QUANTIZED, 64
    options = {"momentum_dtype": kind, **more}
    try:
        engine, optimizer = engine_of(stage, options=options)
        losses = train(engine, range(STEPS))
        got = {"gsnr": gsnr_of(optimizer), "losses": losses}
        differences = largest_difference(got, reference(**options))
    finally:
        momenta.MIN_QUANTIZED = most
    kept = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    momenta_kept = [value for key, value in kept if key.startswith("momentum_buffer")]
    return {**differences, "dtypes": sorted({str(value.dtype) for value in momenta_kept}), "in": len(momenta_kept)}


def resume(stage, **options):
    """Save after half the steps, load into a new engine, go on: bit for bit the uninterrupted run."""
    folder = FOLDER / f"zero{stage}{len(options)}"
    most, momenta.MIN_QUANTIZED = momenta.MIN_QUANTIZED, 64
    try:
        return resumed(stage, folder, options)
    finally:
        momenta.MIN_QUANTIZED = most


def resumed(stage, folder, options):
    whole, _ = engine_of(stage, options=options)
    train(whole, range(STEPS // 2))
    whole.save_checkpoint(str(folder))
    expected = train(whole, range(STEPS // 2, STEPS))
    again, optimizer = engine_of(stage, options=options)
    again.load_checkpoint(str(folder))
    before = optimizer.gsnr_report()
    per_step = []
    with counting(optimizer, per_step):
        got = train(again, range(STEPS // 2, STEPS))
    return {"same": got == expected, "unmeasured": len(before.unmeasured), "collectives": sum(map(len, per_step))}


def through_accelerate(stage):
    """Accelerate's loop, saved in the middle by ``save_state`` and loaded into the same engine by ``load_state``."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # on the CPU DeepSpeed is no engine of accelerate's, but knows the CPU
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as ``accelerate launch`` does
    sys.modules.pop("transformers", None)  # accelerate reads DeepSpeed's config with it
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=0.05)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 8 // WORLD
    # Without it accelerate finds no backend on the CPU, and counts one process.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if DEVICE == "cpu" else []
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)
    model = build()
    sgd_sai = SGDSaI(groups_of(model), **OPTIONS)
    model, optimizer = accelerator.prepare(model, sgd_sai)

    def go_on(steps):
        for step in steps:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, my_batch(step, RANK, WORLD)))
            optimizer.step()
        with torch.no_grad():
            return [mean(loss_of(model, my_batch(step, RANK, WORLD))) for step in range(3)]

    go_on(range(STEPS // 2))
    folder = str(FOLDER / f"accelerate{stage}")
    accelerator.save_state(folder)
    losses = go_on(range(STEPS // 2, STEPS))
    accelerator.load_state(folder)
    return {
        **largest_difference({"gsnr": gsnr_of(sgd_sai), "losses": losses}, reference(clip=0.05)),
        "type": accelerator.distributed_type.name,
        "processes": accelerator.num_processes,
        "same": go_on(range(STEPS // 2, STEPS)) == losses,
    }


def late(stage):
    """A gradient that is zero at first, then non-zero on one rank's part alone."""
    engine, optimizer = engine_of(stage, late=True)

    def advance(loss):
        engine.backward(loss)
        engine.step()

    return compare_late(train_late(engine, optimizer, advance, RANK, WORLD))


def whole_shapes():
    """Grouping sees the shapes that ``zero.Init`` has taken away."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 8, "zero_optimization": {"stage": 3}}):
        model = build()
    plain = build()
    return {
        "names": no_decay_names(model) == no_decay_names(plain),
        "shapes": full_shapes(model.parameters()) == [p.shape for p in plain.parameters()],
        "cut": all(p.numel() == 0 for p in model.parameters()),
    }


def rounding_refused():
    """Flat tensors are float32, whatever the model."""
    engine, _ = engine_of(2, options={"stochastic_rounding": True})
    before = [p.detach().clone() for p in engine.parameters()]
    try:
        train(engine, range(1))
    except ValueError as error:
        message = str(error)
    assert all(torch.equal(a, p) for a, p in zip(before, engine.parameters(), strict=True))
    return {"message": message}


def unknown_layout_refused():
    """A release that is not known, one whose attributes have changed, and states on NVMe."""
    messages = []
    for break_it in ("version", "nvme", "attribute"):
        engine, _ = engine_of(2)
        if break_it == "version":
            known, deepspeed.__version__ = deepspeed.__version__, "0.99.0"
        elif break_it == "nvme":
            engine.optimizer.swap_optimizer = True
        else:
            del engine.optimizer.averaged_gradients
            type(engine.optimizer).averaged_gradients = property(lambda self: self.missing)
        try:
            from hf_sai.distributed.zero import Zero

            Zero(engine.optimizer.optimizer, engine.optimizer)
        except ValueError as error:
            messages.append(str(error))
        if break_it == "version":
            deepspeed.__version__ = known
        elif break_it == "attribute":
            del type(engine.optimizer).averaged_gradients  # other checks build engines of this class
    return {"messages": messages}


def habits(stage, rule):
    """Accumulation, clipping, recomputing, tied and frozen weights, experts without tokens."""
    from habits import CLIP, MICRO_BATCHES, Habits, optimizer_of
    from habits import train as train_habits

    alone = Habits()
    optimizer = optimizer_of(alone, rule)

    def advance():
        torch.nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    losses = train_habits(alone, STEPS, advance)
    expected = {"gsnr": gsnr_of(optimizer), "losses": losses}
    model = Habits()
    optimizer = optimizer_of(model, rule)
    config = {
        "train_micro_batch_size_per_gpu": 8 // WORLD // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    losses = train_habits(engine, STEPS, engine.step, RANK, WORLD, backward=engine.backward)
    return largest_difference({"gsnr": gsnr_of(optimizer), "losses": losses}, expected)


CHECKS = {
    **{
        f"habits{stage}_{rule}": (lambda stage=stage, rule=rule: habits(stage, rule))
        for stage in (2, 3)
        for rule in ("published", "factored")
    },
    **{f"zero{stage}": (lambda stage=stage: train_and_compare(stage)) for stage in (1, 2, 3)},
    "zero3_sub_groups": lambda: train_and_compare(3, sub_group_size=100),
    "zero1_fused": lambda: train_and_compare(1, options={"fused": True}),
    "zero2_normalize": lambda: train_and_compare(2, options={"normalize": True}),
    "zero3_normalize": lambda: train_and_compare(3, options={"normalize": True}),
    **{
        f"zero{stage}_nesterov": (
            lambda stage=stage: train_and_compare(stage, options={"nesterov": True, "update": "factored"})
        )
        for stage in (1, 2, 3)
    },
    "zero2_clipped": lambda: train_and_compare(2, clip=0.05),
    "zero3_clipped": lambda: train_and_compare(3, clip=0.05),
    **{
        f"zero{stage}_{rule}": (lambda stage=stage, rule=rule: train_and_compare(stage, options={"update": rule}))
        for stage in (1, 2, 3)
        for rule in ("rows", "factored")
    },
    "zero3_sub_groups_factored": lambda: train_and_compare(3, options={"update": "factored"}, sub_group_size=100),
    "zero2_factored_clipped": lambda: train_and_compare(2, options={"update": "factored"}, clip=0.05),
    "zero1_bf16": lambda: half(1, torch.bfloat16),
    "zero2_bf16": lambda: half(2, torch.bfloat16),
    "zero3_bf16": lambda: half(3, torch.bfloat16),
    "zero2_fp16": lambda: half(2, torch.float16),
    "zero3_fp16": lambda: half(3, torch.float16),
    "zero2_offload": lambda: train_and_compare(2, offload_optimizer={"device": "cpu"}),
    "zero3_offload": lambda: train_and_compare(3, offload_optimizer={"device": "cpu"}),
    "resume1": lambda: resume(1),
    "resume2": lambda: resume(2),
    "resume3": lambda: resume(3),
    **{f"accelerate{stage}": (lambda stage=stage: through_accelerate(stage)) for stage in (1, 3)},
    **{f"late{stage}": (lambda stage=stage: late(stage)) for stage in (1, 2, 3)},
    "whole_shapes": whole_shapes,
    "rounding_refused": rounding_refused,
    **{
        f"zero{stage}_{kind}": (lambda stage=stage, kind=kind: low_bit(stage, kind))
        for stage in (1, 2, 3)
        for kind in ("8bit", "4bit")
    },
    "zero2_8bit_factored": lambda: low_bit(2, "8bit", update="factored"),
    "zero3_8bit_factored": lambda: low_bit(3, "8bit", update="factored"),
    "zero3_bf16_momentum": lambda: low_bit(3, torch.bfloat16),
    **{
        f"resume{stage}_8bit": (lambda stage=stage: resume(stage, momentum_dtype="8bit", update="factored"))
        for stage in (1, 2, 3)
    },
    "unknown_layout_refused": unknown_layout_refused,
}

if __name__ == "__main__":
    results = {"world_size": dist.get_world_size()}
    for name in sys.argv[1:]:
        results[name] = CHECKS[name]()
    write_result(results)

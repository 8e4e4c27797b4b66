"""Fine-tune Stable Diffusion with any optimizer that Trainer knows, `sgd_sai` among them, in a plain Accelerate loop.

A LoRA that teaches a small base to draw flags, on real pictures that need no network, 2 CPU cores (README.md says how
the base is made):

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/diffusers_text_to_image/train.py recipes/diffusers_text_to_image/demo.yaml

Every key of the YAML file can be set on the command line, which wins:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/diffusers_text_to_image/train.py recipes/diffusers_text_to_image/demo.yaml \\
        --optim adamw_torch --learning_rate 3e-3 --output_dir runs/another_optimizer

Your own pictures (a folder with a metadata.jsonl, or a data set of the Hub), Stable Diffusion 1.5, on a GPU:

    accelerate launch --config_file recipes/accelerate_configs/one_gpu.yaml \\
        recipes/diffusers_text_to_image/train.py recipes/diffusers_text_to_image/sd15_lora.yaml \\
        --train_data_dir my_pictures

Go on after an interruption:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/diffusers_text_to_image/train.py recipes/diffusers_text_to_image/demo.yaml --resume_from_checkpoint true
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from arguments import Arguments, describe_data, describe_model, hub_settings, parse_arguments, plain, public
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from evaluation import denoising_loss, denoising_target, save_grid
from image_data import Encoded, encode, load_splits, text_states, tokenize
from optimizers import build_optimizer, read_settings
from sd_parts import Denoiser, Parts, add_lora, load_parts, make_pipeline, sample, save_lora
from sharded import Whole, in_pieces, pieces_like, prepare_engine, sharded_again, whole_tensors
from tqdm.auto import tqdm
from transformers import get_scheduler

from hf_sai.groups.table import describe_groups
from hf_sai.optim.sgd_sai import SGDSaI
from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.publish import PublishError
from hf_sai.runs.files import atomic_write
from hf_sai.runs.meters import unwrap_optimizer
from hf_sai.runs.recorder import RunRecorder
from hf_sai.trainer.hub_callback import PublishCallback, take_over_push_to_hub
from recipes.common.recipe_input import InputError, delete_checkpoints, find_checkpoint, first_line
from recipes.common.result_files import write_json

STATE_FILE = "training_state.pt"
#: Beside it, what Accelerate saves of weights and optimizer under FSDP2 and DeepSpeed.
ENGINE_FOLDER = "engine"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """What a training run works with; `data` and `empty` (no caption) are encoded already."""

    args: Arguments
    accelerator: Accelerator
    parts: Parts
    data: dict[str, Encoded]
    empty: torch.Tensor
    model: torch.nn.Module
    optimizer: Any
    schedule: Any
    recorder: RunRecorder
    publisher: PublishCallback | None = None
    whole: Whole | None = None  # for drawing and saving
    ema: EMAModel | None = None
    pictures: dict[str, list] = field(default_factory=dict)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def main(argv: list[str] | None = None) -> dict:
    # Everything that can be wrong with the input comes before the output directory is made.
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    checkpoint = find_checkpoint(args, args.restart, marker=STATE_FILE)
    optimizer_settings = read_settings(args)
    accelerator = make_accelerator(args)
    set_seed(args.seed)  # before the parts: a new UNet draws its weights
    parts = load_parts(args)
    splits = load_splits(args)
    model = make_trainable(parts, args, accelerator)
    optimizer = build_optimizer(optimizer_settings, model)
    schedule = make_schedule(optimizer, args)
    data, empty = encode_all(splits, parts, args)
    publisher = take_over_push_to_hub(hub_settings(args, accelerator.process_index), resume=(STATE_FILE,))

    if accelerator.is_main_process and checkpoint is None:
        delete_checkpoints(SimpleNamespace(output_dir=args.output_dir, should_save=args.restart))
    recorder = RunRecorder(
        args.output_dir, data=[describe_data(args)], card=describe_model(args), main_process=accelerator.is_main_process
    )
    whole = Whole(parts, args.train_text_encoder, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(args, accelerator, parts, data, empty, model, optimizer, schedule, recorder, publisher, whole)
    if args.use_ema:
        run.ema = EMAModel(run.trained, decay=args.ema_decay)
    accelerator.init_trackers("text_to_image", plain(args))

    before = evaluate(run, 0, "before")
    first = load_checkpoint(run, checkpoint) if checkpoint else 0
    recorder.start(parts.unet, optimizer, step=first, settings=public(args))
    train(run, first)
    after = evaluate(run, args.max_steps, "after", keep_average=True)
    results = {"before": {"eval_loss": before}, "after": {"eval_loss": after}}
    weights = whole.gather(run.model)
    if weights is not None:
        save_results(run, weights, results)
    accelerator.end_training()
    if publisher:
        publisher.finish()
    return results


def make_accelerator(args: Arguments) -> Accelerator:
    wanted = None if args.report_to == "none" else args.report_to
    try:
        accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            log_with=wanted,
            project_dir=args.output_dir,
        )
    except ValueError as error:  # an unknown tracker, or bfloat16 that the device cannot do
        raise InputError(f"cannot set up Accelerate: {first_line(error)}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision is fp16, which needs a GPU; on a CPU give bf16, or no.")
    prepare_engine(accelerator, args)
    if wanted and not accelerator.log_with:
        raise InputError(f"report_to is {wanted}, which is not installed; install it, or give --report_to none.")
    return accelerator


def make_trainable(parts: Parts, args: Arguments, accelerator: Accelerator) -> Denoiser:
    """Put all on the device, frozen weights in half precision if training is; the trained ones in float32."""
    half = DTYPES.get(accelerator.mixed_precision, torch.float32)
    for module in (parts.vae, parts.text_encoder, parts.unet):
        module.to(accelerator.device)
    if half != torch.float32 and not (in_pieces(accelerator) and args.train_text_encoder):
        parts.text_encoder.to(half)  # not the autoencoder, which runs once and overflows in float16 in some checkpoints
    if args.train == "full":
        parts.unet.requires_grad_(True)
    else:
        if half != torch.float32 and not in_pieces(accelerator):  # FSDP2 shards tensors of one dtype together
            parts.unet.to(half)
        add_lora(parts, args)
        cast_training_params([parts.unet, parts.text_encoder], dtype=torch.float32)
    if args.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            # The reentrant kind, transformers' default before 5.0, gives no gradients where the input needs none.
            parts.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return Denoiser(parts.unet, parts.text_encoder if args.train_text_encoder else None)


def make_schedule(optimizer: torch.optim.Optimizer, args: Arguments) -> Any:
    """Not given to Accelerate, which would step it once for each process."""
    try:
        return get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot make the schedule {args.lr_scheduler_type!r}: {error}.") from error


def encode_all(splits: dict, parts: Parts, args: Arguments) -> tuple[dict[str, Encoded], torch.Tensor]:
    """Return each split encoded, and the empty caption: its states, or its tokens if the text encoder is trained."""
    frozen = None if args.train_text_encoder else parts.text_encoder
    data = {name: encode(rows, args, parts.vae, parts.tokenizer, frozen) for name, rows in splits.items()}
    empty = tokenize(parts.tokenizer, [""])
    return data, empty if frozen is None else text_states(frozen, empty)


def train(run: Run, first: int) -> None:
    """Take the steps from `first` to `max_steps`, with all that comes between them."""
    args, accelerator, recorder = run.args, run.accelerator, run.recorder
    hidden = args.disable_tqdm or not accelerator.is_main_process
    steps = tqdm(range(first, args.max_steps), "training", args.max_steps, initial=first, unit="step", disable=hidden)
    run.model.train()
    run.optimizer.train()  # schedule-free optimizers keep two sets of weights
    losses: list[float] = []
    for step in (done + 1 for done in steps):
        logs = step % args.logging_steps == 0 or step == args.max_steps
        with recorder.step():
            loss, norm = take_step(run, step, measure=logs)
        losses.append(loss)
        if logs:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses.clear()
            if not numpy.isfinite(mean):
                raise InputError(f"the loss is {mean} at step {step}; take a smaller --learning_rate.")
            values = {"loss": mean, "grad_norm": float(norm), "learning_rate": run.schedule.get_last_lr()[0]}
            accelerator.log(recorder.log(step, values), step=step)
            steps.set_postfix(loss=f"{mean:.4f}")
        if args.eval_steps and step % args.eval_steps == 0 and step < args.max_steps:
            evaluate(run, step, f"step-{step}")
        if args.save_steps and step % args.save_steps == 0:
            save_checkpoint(run, step)
    run.optimizer.eval()


def take_step(run: Run, step: int, measure: bool) -> tuple[torch.Tensor, Any]:
    """Take an optimizer step; return the mean loss and the norm of the gradients before clipping."""
    accelerator, losses, norm = run.accelerator, [], 0.0
    # A step draws from a seed of its own, so that a resumed run draws what an uninterrupted one would have.
    draws = numpy.random.SeedSequence((run.args.seed, step, accelerator.process_index))
    torch.manual_seed(int(draws.generate_state(1)[0]))
    for rows in batches(run, step):
        with accelerator.accumulate(run.model):
            loss = training_loss(run, rows)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.trained, run.args.max_grad_norm or float("inf"))
                (norm,) = whole_tensors([norm])
                run.recorder.update_begins(measure=measure)
            run.optimizer.step()  # Accelerate skips it while it accumulates
            run.optimizer.zero_grad()
    run.recorder.update_ends()
    run.schedule.step()
    if run.ema is not None:
        run.ema.step(run.trained)
    return torch.stack(losses).mean(), norm


def batches(run: Run, step: int) -> Iterator[torch.Tensor]:
    """Yield the rows that this process sees in a step: a part of an endless line of shuffled epochs."""
    args, processes, total = run.args, run.accelerator.num_processes, len(run.data["train"])
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    begin, epochs = (step - 1) * size, []
    for epoch in range(begin // total, (begin + size - 1) // total + 1):
        shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        epochs.append(torch.randperm(total, generator=shuffle))
    rows = torch.cat(epochs)[begin % total :][:size]
    yield from rows[run.accelerator.process_index :: processes].split(args.per_device_train_batch_size)


def training_loss(run: Run, rows: torch.Tensor) -> torch.Tensor:
    """Return the denoising loss of some rows at random timesteps, weighted by min-SNR (arXiv 2303.09556) if asked."""
    data, noise, device = run.data["train"], run.parts.noise, run.accelerator.device
    latents = data.mean[rows] + data.std[rows] * torch.randn(data.std[rows].shape)
    added, timesteps = torch.randn(latents.shape), torch.randint(noise.config.num_train_timesteps, (len(rows),))
    text = (data.tokens if data.states is None else data.states)[rows]
    left_out = torch.rand(len(rows)) < run.args.empty_captions
    text = torch.where(left_out.view(-1, *[1] * (text.dim() - 1)), run.empty, text)
    latents, added, timesteps, text = (tensor.to(device) for tensor in (latents, added, timesteps, text))

    predicted = run.model(noise.add_noise(latents, added, timesteps), timesteps, text)
    target = denoising_target(noise, latents, added, timesteps)
    losses = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    if run.args.snr_gamma is not None:
        snr = compute_snr(noise, timesteps)
        weights = snr.clamp(max=run.args.snr_gamma)
        losses = losses * weights / (snr + 1 if noise.config.prediction_type == "v_prediction" else snr)
    return losses.mean()


def evaluate(run: Run, step: int, name: str, keep_average: bool = False) -> float:
    """Return the held-out loss, of the moving average if there is one, and draw the validation images.

    Every process does it, and comes to the same result, so that none has to wait for another.
    """
    args, accelerator = run.args, run.accelerator
    run.model.eval()
    run.optimizer.eval()
    if run.ema is not None:
        sharded_again(run.model)
        run.ema.store(run.trained)
        run.ema.copy_to(run.trained)
    loss = denoising_loss(
        run.model, run.data["validation"], run.parts.noise, accelerator.device, args.per_device_eval_batch_size
    )
    run.recorder.append(step, {"eval_loss": loss})
    accelerator.log({"eval_loss": loss}, step=step)
    parts = run.whole.gather(run.model) if args.validation_prompts else None
    if parts is not None:
        half = DTYPES.get(accelerator.mixed_precision)
        with run.whole.on_device(parts), torch.autocast(accelerator.device.type, half, enabled=half is not None):
            run.pictures[name] = drawn = sample(make_pipeline(parts), args.validation_prompts, args)
        save_grid({name: drawn}, args.validation_prompts, Path(args.output_dir, "images", f"{name}.png"))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                images = numpy.stack([numpy.asarray(picture) for picture in drawn])
                tracker.log_images({"validation": images}, step, **shape)
    sharded_again(run.model)
    if run.ema is not None and not keep_average:
        run.ema.restore(run.trained)
    run.optimizer.train()
    run.model.train()
    return loss


def save_checkpoint(run: Run, step: int) -> None:
    """Save what training goes on from, all or nothing: trained weights, optimizer, schedule, moving average."""
    accelerator, main = run.accelerator, run.accelerator.is_main_process
    pieces = in_pieces(accelerator)
    folder = Path(run.args.output_dir, f"checkpoint-{step}")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if pieces:
        accelerator.save_state(str(unfinished / ENGINE_FOLDER))
        accelerator.wait_for_everyone()
    ema = run.ema and run.ema.state_dict()
    if ema:
        ema = {**ema, "shadow_params": whole_tensors(ema["shadow_params"])}
    publish = run.publisher is not None and run.args.hub_strategy != "end"
    parts = run.whole.gather(run.model) if publish else None
    if not main:
        return
    model = accelerator.unwrap_model(run.model)
    trained = {name: None if pieces else value for name, value in model.named_parameters() if value.requires_grad}
    state = {
        "step": step,
        "weights": trained,
        "optimizer": None if pieces else run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "ema": ema,
        "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
    }
    torch.save(state, unfinished / STATE_FILE)
    if parts is not None:
        save_weights(run, parts, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    run.recorder.save(folder)
    run.recorder.save()
    if publish:
        run.publisher.saved(step)
    saved = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for old in saved[: -(run.args.save_total_limit or len(saved))]:
        shutil.rmtree(old)


def save_weights(run: Run, parts: Parts, folder: Path) -> None:
    """Save what others load: the whole pipeline after full training, else the adapters."""
    if run.args.train == "full":
        make_pipeline(parts).save_pretrained(folder)
    else:
        save_lora(parts, folder)


def load_checkpoint(run: Run, folder: str) -> int:
    """Return the step that a checkpoint was saved after, with everything as it was then."""
    state = torch.load(Path(folder, STATE_FILE), map_location="cpu", weights_only=True)
    if state["step"] >= run.args.max_steps:
        raise InputError(
            f"{folder} is from step {state['step']}; max_steps is {run.args.max_steps}, so nothing is left."
        )
    names = {name for name, value in run.accelerator.unwrap_model(run.model).named_parameters() if value.requires_grad}
    if names != set(state["weights"]) or (state["ema"] is None) != (run.ema is None):
        raise InputError(f"{folder} is from a run with other trained weights; give the options of that run.")
    pieces = in_pieces(run.accelerator)
    if pieces != Path(folder, ENGINE_FOLDER).is_dir():
        saved, here = ("whole", "pieces of it") if pieces else ("pieces of it", "whole")
        raise InputError(
            f"{folder} holds the model {saved}, and this run has {here} on a device; give that run's configuration."
        )
    if pieces:
        run.accelerator.load_state(str(Path(folder, ENGINE_FOLDER)))
    else:
        run.accelerator.unwrap_model(run.model).load_state_dict(state["weights"], strict=False)
        run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])
        run.ema.to(run.accelerator.device)
        run.ema.shadow_params = pieces_like(run.ema.shadow_params, run.trained)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]


def save_results(run: Run, weights: Parts, results: dict) -> None:
    """Save the weights, results.json, the group report, pictures and the model card; say where they are."""
    args, folder = run.args, Path(run.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(run, weights, folder)
    last = folder / f"checkpoint-{args.max_steps}"
    saved = {**results, "settings": public(args), "checkpoint": last.name if last.is_dir() else None}
    write_json(folder / "results.json", saved)
    optimizer = unwrap_optimizer(run.optimizer)
    if isinstance(optimizer, SGDSaI):
        atomic_write(folder / "groups.txt", describe_groups(optimizer) + "\n")
    if run.pictures:
        save_grid(run.pictures, args.validation_prompts, folder / "images" / "grid.png")
        run.recorder.add(images=[{"title": "Validation images", "file": "images/grid.png"}])
    run.recorder.finish({"eval_loss": results["after"]["eval_loss"], "before training": results["before"]})
    *pictures, card = finish_run(folder)
    print(
        f"\neval loss {results['before']['eval_loss']:.4f} before, {results['after']['eval_loss']:.4f} after training"
    )
    print(f"model: {folder}\nmodel card: {card}\nnumbers: {folder / 'results.json'}")
    print(f"pictures: {', '.join(map(str, pictures))}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, PublishError) as problem:
        sys.exit(f"train.py: {problem}")

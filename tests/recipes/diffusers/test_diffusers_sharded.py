"""The diffusers recipe under FSDP2 and DeepSpeed, in two processes: as under DDP, and resumed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from scripts import RECIPE, ROOT, sharded

from hf_sai.runs.record import RunRecord
from recipes.common.recipe_input import InputError

sys.path.append(str(Path(__file__).parents[2] / "distributed"))
from launch import HERE, finish, start_python

CONFIGS = ROOT / "recipes" / "accelerate_configs"
ENGINES = ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
FULL = ["--train", "full", "--gradient_accumulation_steps", "2", "--save_steps", "2"]
LORA = ["--train", "lora", "--train_text_encoder", "true", "--optim", "sgd_sai_factored", "--learning_rate", "1e-3"]


def run(config, folder, tiny, photos, *options):
    """Four steps; returns the run's record."""
    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")
    on_cpu = {"DS_ACCELERATOR": "cpu"} if config.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    words = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", 2]
    words += ["--main_process_port", 0, "--mixed_precision", "no", HERE / "on_cpu.py", RECIPE / "train.py"]
    words += ["--output_dir", folder, "--pretrained_model_name_or_path", tiny, "--train_data_dir", photos]
    words += ["--resolution", 16, "--held_out_rows", 4, "--max_steps", 4, "--per_device_train_batch_size", 2]
    words += ["--logging_steps", 1, "--disable_tqdm", "true", "--num_inference_steps", 2]
    words += ["--validation_prompts", '["animal: cat"]', "--use_cpu", str(not config.startswith("zero")).lower()]
    log = folder.with_suffix(f".{len(options)}.txt")
    outcome = finish([start_python([*words, *options], log, PYTHONPATH=str(ROOT), **on_cpu)])
    assert outcome == [0], log.read_text()[-6000:]
    record = RunRecord.load(folder)
    assert record.hardware["processes"] == 2
    return record


def check_equal(record, expected):
    for curve in ("loss", "eval_loss", "grad_norm"):
        found = dict(record.curve(curve))
        assert len(found) >= 2
        assert found == pytest.approx(dict(expected.curve(curve)), rel=1e-5)
    gsnr, own = ({row["name"]: row["gsnr"] for row in of.gsnr["parameters"]} for of in (record, expected))
    assert None not in own.values()
    assert sorted(gsnr.values()) == pytest.approx(sorted(own.values()), rel=1e-5)


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory, tiny, photos):
    """By what is trained."""
    folder = tmp_path_factory.mktemp("ddp")
    found = {}

    def record(name, options):
        if name not in found:
            found[name] = run("ddp", folder / name, tiny, photos, *options)
        return found[name]

    return record


@pytest.mark.parametrize("engine", ENGINES)
def test_full_training_is_that_under_ddp_and_anyone_loads_what_it_saves(engine, under_ddp, tiny, photos, tmp_path):
    check_equal(run(engine, tmp_path / "run", tiny, photos, *FULL), under_ddp("full", FULL))
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "run", safety_checker=None).unet is not None
    assert (tmp_path / "run" / "images" / "grid.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_lora_on_both_parts_is_that_under_ddp(engine, under_ddp, tiny, photos, tmp_path):
    check_equal(run(engine, tmp_path / "run", tiny, photos, *LORA), under_ddp("lora", LORA))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "run")
    assert pipeline.get_list_adapters().keys() == {"unet", "text_encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_resumed_run_ends_with_the_same_weights(engine, tiny, photos, tmp_path):
    options = [*FULL, "--use_ema", "true", "--ema_decay", "0.5"] if engine == "fsdp2" else FULL
    run(engine, tmp_path / "run", tiny, photos, *options)
    saved = tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    whole, results = load_file(saved), json.loads((tmp_path / "run" / "results.json").read_text())
    run(engine, tmp_path / "run", tiny, photos, *options, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-2")
    resumed = load_file(saved)
    assert resumed.keys() == whole.keys()
    assert all(resumed[name].equal(value) for name, value in whole.items())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"] == results["after"]


def accelerator(kind, fsdp2=False, stage=3, gathers=False):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("engine", "ema", "words"),
    [
        (accelerator(DistributedType.FSDP), False, "fsdp_version: 2"),
        (accelerator(DistributedType.XLA), False, "does not run under XLA"),
        (accelerator(DistributedType.DEEPSPEED, gathers=True), True, "use_ema"),
        (accelerator(DistributedType.DEEPSPEED), False, "zero3_save_16bit_model"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_cure(engine, ema, words):
    with pytest.raises(InputError, match=words):
        sharded.prepare_engine(engine, SimpleNamespace(use_ema=ema))


def test_an_engine_that_accelerate_silently_left_out_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="made MULTI_CPU of it"):
        sharded.prepare_engine(accelerator(DistributedType.MULTI_CPU), SimpleNamespace(use_ema=False))


def test_deepspeed_gets_the_recipes_options():
    engine = accelerator(DistributedType.DEEPSPEED, stage=2)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_grad_norm": 0.5}
    sharded.prepare_engine(engine, SimpleNamespace(use_ema=False, **options))
    config = engine.state.deepspeed_plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["gradient_clipping"] == 0.5

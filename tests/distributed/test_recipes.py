"""Every recipe's smoke run in two processes of ``torchrun``, against one process on the same global batch."""

import pytest
import yaml
from launch import HERE, finish, start_python

from hf_sai.runs.record import RunRecord

pytestmark = pytest.mark.slow
RECIPES = HERE.parents[1] / "recipes"
STEPS = 4
#: Those that draw noise, anew on every rank, so that losses are only near those of one process.
NOISY = "diffusers_text_to_image"
#: A softmax does not see what is added to all keys alike: the gradient is zero but for rounding.
ZERO_BUT_FOR_ROUNDING = "k_proj.bias"


def run(folder, *words):
    folder.mkdir(exist_ok=True)
    outcome = finish([start_python(words, folder / "log.txt")])
    assert outcome == [0], (folder / "log.txt").read_text()[-6000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stable Diffusion's other parts, barely trained, of which the recipe's smoke run trains a UNet."""
    folder = tmp_path_factory.mktemp("base")
    make = RECIPES / "diffusers_text_to_image" / "make_base.py"
    run(folder, make, "--output_dir", folder / "parts", "--autoencoder_steps", 3, "--clip_steps", 3)
    return folder / "parts"


@pytest.mark.parametrize("recipe", ["gpt2_pretraining", "llama_lora", "vit_classification", NOISY])
def test_the_smoke_run_in_two_processes_is_that_of_one(request, tmp_path, recipe):
    smoke = RECIPES / recipe / "smoke.yaml"
    batch = yaml.safe_load(smoke.read_text())["per_device_train_batch_size"]
    options = ["--use_cpu", "true", "--max_steps", STEPS, "--logging_steps", 1, "--report_to", "none"]
    if recipe == NOISY:
        options += ["--pretrained_model_name_or_path", request.getfixturevalue("base")]
    losses, gsnr = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        own = ["--output_dir", folder / "run", "--per_device_train_batch_size", batch // processes]
        run(folder, *launcher, smoke.with_name("train.py"), smoke, *options, *own)
        record = RunRecord.load(folder / "run")
        assert record.hardware["processes"] == processes
        losses[processes] = [loss for _, loss in record.curve("loss")]
        rows = record.gsnr["parameters"]
        gsnr[processes] = {row["name"]: row["gsnr"] for row in rows if ZERO_BUT_FOR_ROUNDING not in row["name"]}
    assert len(losses[2]) == STEPS
    assert gsnr[2].keys() == gsnr[1].keys()
    assert None not in gsnr[2].values()
    if recipe == NOISY:
        assert losses[2] == pytest.approx(losses[1], rel=0.5)
    else:
        assert losses[2] == pytest.approx(losses[1], rel=1e-5)
        assert gsnr[2] == pytest.approx(gsnr[1], rel=1e-6)

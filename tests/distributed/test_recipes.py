"""Every recipe's smoke run in two processes of ``torchrun``, against one process on the same global batch."""

import pytest
import yaml
from launch import HERE, finish, start_python

from hf_sai.record import RunRecord

pytestmark = pytest.mark.slow
RECIPES = HERE.parents[1] / "recipes"
STEPS = 4
#: Recipe -> relative difference of losses and g-SNR that is allowed: sums of float32 in another order. The pictures'
#: noise is drawn anew on every rank.
TOLERANCE = {"gpt2_pretraining": 1e-4, "llama_lora": 1e-4, "vit_classification": 1e-4, "diffusers_text_to_image": None}


def run(folder, *words):
    folder.mkdir()
    outcome = finish([start_python(words, folder / "log.txt")])
    assert outcome == [0], (folder / "log.txt").read_text()[-6000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stable Diffusion's other parts, barely trained, of which the recipe's smoke run trains a UNet."""
    folder = tmp_path_factory.mktemp("base")
    make = RECIPES / "diffusers_text_to_image" / "make_base.py"
    run(folder, make, "--output_dir", folder / "parts", "--autoencoder_steps", 3, "--clip_steps", 3)
    return folder / "parts"


@pytest.mark.parametrize("recipe", TOLERANCE)
def test_the_smoke_run_in_two_processes_is_that_of_one(request, tmp_path, recipe):
    smoke = RECIPES / recipe / "smoke.yaml"
    batch = yaml.safe_load(smoke.read_text())["per_device_train_batch_size"]
    options = ["--use_cpu", "true", "--max_steps", STEPS, "--logging_steps", 1, "--report_to", "none"]
    if recipe == "diffusers_text_to_image":
        options += ["--pretrained_model_name_or_path", request.getfixturevalue("base")]
    records = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        own = ["--output_dir", folder / "run", "--per_device_train_batch_size", batch // processes]
        run(folder, *launcher, smoke.with_name("train.py"), smoke, *options, *own)
        records[processes] = RunRecord.load(folder / "run")
        assert records[processes].hardware["processes"] == processes
    one, two = ([loss for _, loss in records[processes].curve("loss")] for processes in (1, 2))
    assert len(two) == STEPS
    one_gsnr, two_gsnr = (
        {row["name"]: row["gsnr"] for row in records[processes].gsnr["parameters"]} for processes in (1, 2)
    )
    assert two_gsnr.keys() == one_gsnr.keys()
    assert any(two_gsnr.values())
    tolerance = TOLERANCE[recipe]
    assert two == pytest.approx(one, rel=tolerance or 0.5)
    if tolerance:
        assert two_gsnr == pytest.approx(one_gsnr, rel=tolerance)

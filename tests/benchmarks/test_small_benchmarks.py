"""The benchmarks of one page: what they measure is what is there, and a script that ends too early is named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sai.optim.gsnr import measure_gsnr

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SCRIPT = """
import torch
from hf_sai import SGDSaI

torch.manual_seed(0)
model = torch.nn.Linear(6, 5)
optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
for step in range(4):
    optimizer.zero_grad()
    (model(torch.ones(3, 6)) ** (step + 1)).sum().backward()
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Where a script is run its folder is on the path."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gsnr_stability_measures_every_step_and_draws(tmp_path, monkeypatch, capsys):
    benchmark, script, output = load("gsnr_stability"), tmp_path / "script.py", tmp_path / "out" / "training.json"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["gsnr_stability.py", "--steps", "3", "--output", str(output), str(script)])
    benchmark.main()
    tensors = json.loads(output.read_text())
    assert {name: (t["kind"], t["elements"]) for name, t in tensors.items()} == {
        "weight": ("matrices", 30),
        "bias": ("vectors", 5),
    }
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    model(torch.ones(3, 6)).sum().backward()
    first = measure_gsnr([model.weight.grad, model.bias.grad])
    assert [t["gsnr"][0] for t in tensors.values()] == pytest.approx(first)
    assert all(len(t["gsnr"]) == 3 for t in tensors.values())

    picture = tmp_path / "picture"
    monkeypatch.setattr(sys, "argv", ["gsnr_stability.py", "--picture", str(picture), str(output)])
    benchmark.main()
    assert "| training | vectors |" in capsys.readouterr().out
    assert picture.with_suffix(".png").stat().st_size > 1000


def test_gsnr_stability_names_a_script_that_ends_too_early(tmp_path, monkeypatch):
    benchmark, script = load("gsnr_stability"), tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(
        sys, "argv", ["gsnr_stability.py", "--steps", "9", "--output", str(tmp_path / "x"), str(script)]
    )
    with pytest.raises(SystemExit, match="took 4 steps with SGD-SaI, fewer than --steps 9"):
        benchmark.main()
    assert not (tmp_path / "x").exists()


def test_peak_memory_counts_gradients_and_states(monkeypatch):
    benchmark = load("peak_memory")
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)

    def skeleton(name):
        with torch.device("meta"):
            return GPT2LMHeadModel(config)

    monkeypatch.setattr(benchmark, "build_skeleton", skeleton)
    params = list(GPT2LMHeadModel(config).parameters())  # the head is the embedding
    elements = sum(p.numel() for p in params)
    plain, adamw, released = (
        benchmark.measure("tiny", 16, benchmark.OPTIMIZERS[name])
        for name in ("SGD-SaI", "torch AdamW, fused", "SGD-SaI, gradient release")
    )
    assert plain["gradients"] == 4 * elements
    assert plain["states"] == released["states"] == 4 * elements + 8 * len(params)  # a buffer and the g-SNR
    assert released["gradients"] == 0
    assert adamw["states"] == pytest.approx(8 * elements, rel=0.01)


def test_training_step_times_what_every_optimizer_does_on_a_model_of_its_own(monkeypatch, tmp_path, capsys):
    benchmark = load("training_step")
    made = []

    def start():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        made.append([parameter.detach().clone() for parameter in model.parameters()])
        return model, (model(torch.full((3, 4), float(row))).sum() for row in range(100))

    monkeypatch.setattr(benchmark, "TASKS", {"tiny": lambda: start})
    output = tmp_path / "times.json"
    flags = ["--rounds", "2", "--optimizers", "adamw", "factored", "schedule_free", "--output", str(output)]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    benchmark.main(flags)
    found = json.loads(output.read_text())["tasks"]["tiny"]
    assert set(found["update_seconds"]) == {"adamw", "factored", "schedule_free"}
    assert min(found["gradient_seconds"], *found["update_seconds"].values()) > 0
    assert len(made) == 3
    assert all(torch.equal(*pair) for pair in zip(made[0], made[2], strict=True))
    assert "| adamw | 1.00 (" in capsys.readouterr().out


def test_training_step_shows_the_whole_step_over_adamws():
    tasks = {
        "tiny": {"gradient_seconds": 0.3, "update_seconds": {"adamw": 0.1, "orthogonal": 0.5}},
        "adapter": {"gradient_seconds": 0.3, "update_seconds": {"adamw": 0.1}},
    }
    assert load("training_step").table({"tasks": tasks}).splitlines()[2:] == [
        "| adamw | 1.00 (25%) | 1.00 (25%) |",
        "| orthogonal | 2.00 (62%) | - |",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--rounds", "0"],
        ["--optimizers", "factored"],
        ["--optimizers", "adan"],
        ["gpt3"],
        ["--output", "/no/such/file"],
    ],
    ids=" ".join,
)
def test_training_step_refuses_what_it_cannot_time(flags):
    benchmark = load("training_step")
    with pytest.raises(benchmark.InputError):
        benchmark.main(flags)

"""Every config of recipes/accelerate_configs, and torchrun, start an unmodified script through ``hf_sai.run``.

They get the right engine and the losses of one process. Each launch takes more than half a minute of one core, so most
are run by ``make test-slow`` alone.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from launch import HERE, finish, free_port, start_python

CONFIGS = HERE.parents[1] / "recipes" / "accelerate_configs"
SCRIPT = [
    "-m", "hf_sai.run", str(HERE / "plain_script.py"), "--optim", "sgd_sai", "--learning_rate", "3e-2",
    "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true", "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip
#: Config -> distributed type, mesh; what the launch line must say on a machine without 8 GPUs.
ONE_MACHINE = {
    "cpu": ("NO", None, ["--num_processes", "1"]),
    "one_gpu": ("NO", None, ["--num_processes", "1"]),
    "ddp": ("MULTI_CPU", None, ["--num_processes", "2"]),
    "fsdp2": ("FSDP", [2], ["--num_processes", "2"]),
    "hsdp": (
        "FSDP",
        [2, 2],
        ["--num_processes", "4", "--num_machines", "1", "--parallelism_config_dp_shard_size", "2"],
    ),
    "zero1": ("DEEPSPEED", None, ["--num_processes", "2"]),
    "zero2": ("DEEPSPEED", None, ["--num_processes", "2"]),
    "zero3": ("DEEPSPEED", None, ["--num_processes", "2"]),
}
TWO_MACHINES = {"multi_node_ddp": "MULTI_CPU", "multi_node_fsdp2": "FSDP", "multi_node_zero3": "DEEPSPEED"}


def start(config, folder, *options, world_size):
    """``accelerate launch``."""
    if "zero" in config and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")
    environment = {"DS_ACCELERATOR": "cpu"}
    if "zero" not in config:  # DeepSpeed is no engine of accelerate's on the CPU, but knows the CPU itself
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return run_script(folder, [*launcher, "--mixed_precision", "no", *options], world_size, **environment)


def torchrun(folder, *options, world_size):
    """The same by ``torchrun``."""
    return run_script(folder, ["-m", "torch.distributed.run", *options], world_size)


def run_script(folder, launcher, world_size, **environment):
    """The 8 sequences of a step do not depend on the number of processes."""
    own = ["--output_dir", folder, "--per_device_train_batch_size", 8 // world_size]
    log_file = folder / f"log_{len(list(folder.glob('log_*')))}.txt"
    return start_python([*launcher, *SCRIPT, *own], log_file, folder, **environment)


def reports(processes, folder, world_size):
    outcome = finish(processes)
    logs = "\n".join(log.read_text()[-5000:] for log in sorted(folder.glob("log_*")))
    assert not any(outcome), logs
    files = [Path(folder, f"rank_{rank}.json") for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process, which no launcher started."""
    folder = tmp_path_factory.mktemp("alone")
    (report,) = reports([run_script(folder, [], 1)], folder, 1)
    assert (report["type"], report["world_size"]) == ("NO", 1)
    return report["losses"]


def check(found, distributed_type, world_size, losses):
    for report in found:
        assert report["type"] == distributed_type
        assert report["world_size"] == report["processes"] == world_size
        assert report["optimizer"] == "SGDSaI"
        assert report["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "config", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_MACHINE if name != "fsdp2")]
)
def test_the_config_starts_its_engine_on_one_machine(tmp_path, config, alone):
    distributed_type, mesh, options = ONE_MACHINE[config]
    world_size = int(options[1])
    launched = start(config, tmp_path, *options, "--main_process_port", "0", world_size=world_size)
    found = reports([launched], tmp_path, world_size)
    check(found, distributed_type, world_size, alone)
    assert all(report["mesh"] == mesh for report in found)


@pytest.mark.slow
@pytest.mark.parametrize("config", TWO_MACHINES)
def test_the_config_joins_two_machines(tmp_path, config, alone):
    """Two launches on one machine, each with one process, that meet over the loopback device."""
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launched = [start(config, tmp_path, "--machine_rank", str(rank), *options, world_size=2) for rank in (0, 1)]
    found = reports(launched, tmp_path, 2)
    check(found, TWO_MACHINES[config], 2, alone)
    assert [report["local_world_size"] for report in found] == [1, 1]


def test_torchrun_starts_two_processes(tmp_path, alone):
    launched = torchrun(tmp_path, "--standalone", "--nproc_per_node", "2", world_size=2)
    check(reports([launched], tmp_path, 2), "MULTI_CPU", 2, alone)


@pytest.mark.slow
def test_torchrun_joins_two_machines(tmp_path, alone):
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    options += ["--master_port", str(free_port())]
    launched = [torchrun(tmp_path, *options, "--node_rank", str(rank), world_size=2) for rank in (0, 1)]
    found = reports(launched, tmp_path, 2)
    check(found, "MULTI_CPU", 2, alone)
    assert [report["local_world_size"] for report in found] == [1, 1]

"""Every config of recipes/accelerate_configs starts an unmodified script through ``hf_sai.run``, with the right engine.

Each launch takes more than half a minute of one core, so most are run by ``make test-slow`` alone.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch import HERE, finish

CONFIGS = HERE.parents[1] / "recipes" / "accelerate_configs"
SCRIPT = [
    "-m", "hf_sai.run", str(HERE / "plain_script.py"), "--optim", "sgd_sai", "--learning_rate", "3e-2",
    "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "true", "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip
#: Config -> distributed type, mesh; what the launch line must say on a machine without 8 GPUs.
ONE_MACHINE = {
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
    """``accelerate launch``; the 8 sequences of a step do not depend on the number of processes."""
    if "zero" in config and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if "zero" not in config:  # DeepSpeed is no engine of accelerate's on the CPU, but knows the CPU itself
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    own = ["--output_dir", str(folder), "--per_device_train_batch_size", str(8 // world_size)]
    with (folder / f"log_{len(list(folder.glob('log_*')))}.txt").open("w") as out:
        return subprocess.Popen(
            [*launcher, "--mixed_precision", "no", *options, *SCRIPT, *own],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def reports(processes, folder, world_size):
    outcome = finish(processes)
    logs = "\n".join(log.read_text()[-5000:] for log in sorted(folder.glob("log_*")))
    assert not any(outcome), logs
    files = [Path(folder, f"rank_{rank}.json") for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files]


def check(found, distributed_type, world_size):
    for report in found:
        assert report["type"] == distributed_type
        assert report["world_size"] == report["processes"] == world_size
        assert report["optimizer"] == "SGDSaI"
        # The same as in one process, which tests/distributed/test_trainer.py runs: the global batch is the same.
        assert report["losses"] == pytest.approx([3.6590428, 3.6672940], rel=1e-5)


@pytest.mark.parametrize(
    "config", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_MACHINE if name != "fsdp2")]
)
def test_the_config_starts_its_engine_on_one_machine(tmp_path, config):
    distributed_type, mesh, options = ONE_MACHINE[config]
    world_size = int(options[1])
    launched = start(config, tmp_path, *options, "--main_process_port", "0", world_size=world_size)
    found = reports([launched], tmp_path, world_size)
    check(found, distributed_type, world_size)
    assert all(report["mesh"] == mesh for report in found)


@pytest.mark.slow
@pytest.mark.parametrize("config", TWO_MACHINES)
def test_the_config_joins_two_machines(tmp_path, config):
    """Two launches on one machine, each with one process, that meet over the loopback device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launched = [start(config, tmp_path, "--machine_rank", str(rank), *options, world_size=2) for rank in (0, 1)]
    found = reports(launched, tmp_path, 2)
    check(found, TWO_MACHINES[config], 2)
    assert [report["local_world_size"] for report in found] == [1, 1]

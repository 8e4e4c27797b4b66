"""Tests can run side by side: their ranks meet on no fixed port, and no process is left behind.

The check for the latter sees what a launcher's child has started in a session of its own.
"""

import json
import os
import re
import subprocess
import sys

import launch

ORPHAN = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"


def test_a_process_that_outlives_its_launcher_is_found_and_ended():
    subprocess.run([sys.executable, "-c", ORPHAN], check=True)
    left = launch.living(os.environ[launch.MARK], patience=0)
    assert launch.end_all(left) == ["sleep 600"]
    assert not launch.living(os.environ[launch.MARK])


def test_when_one_process_fails_the_others_are_ended():
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    assert launch.finish([sleeper, failing])[1] == 3
    assert sleeper.returncode < 0


#: ``port`` and a number that is not 0 (any free one), however a command line, a URL or Python joins the two.
FIXED_PORT = re.compile(r"""(?:port["']?\s*[=:,]?\s*["']?|(?:localhost|127\.0\.0\.1):)[1-9]""", re.IGNORECASE)
MEET = """
import torch, torch.distributed as dist
from common import join, write_result
rank, world_size = join()
total = torch.tensor([float(rank)])
dist.all_reduce(total)
write_result({"world_size": world_size, "total": total.item()})
"""


def test_no_test_names_a_port():
    named = ['--main_process_port", "29500"', "MASTER_PORT=29500", '"MASTER_PORT": "1"', "localhost:1", "127.0.0.1:5"]
    assert all(FIXED_PORT.search(text) for text in named)
    files = [file for file in launch.HERE.glob("*.py") if file.name != "test_launch.py"]
    assert not {file.name: found for file in files if (found := FIXED_PORT.findall(file.read_text()))}


def test_two_groups_started_at_the_same_time_both_finish(tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    folders = [tmp_path / name for name in ("one", "other")]
    started = [launch.start_ranks(tmp_path / "meet.py", 2, folder) for folder in folders]
    assert launch.finish([process for processes in started for process in processes]) == [0] * 4
    for folder in folders:
        for rank in range(2):
            result = json.loads((folder / f"result_{rank}.json").read_text())
            assert result == {"world_size": 2, "total": 1.0}

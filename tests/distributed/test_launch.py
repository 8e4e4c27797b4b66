"""The check that no process is left behind sees what a launcher's child has started in a session of its own."""

import os
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

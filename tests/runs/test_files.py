"""Files written whole or not at all, and nothing left lying about by a process that was killed."""

import os
import time

import pytest

from hf_sai.cli.main import main
from hf_sai.runs.files import atomic_write, read_text

#: What a test that waits for ever is ended by, instead of the whole run.
SOON = pytest.mark.timeout(60)


def test_the_part_of_a_killed_process_is_cleared_by_the_next_and_that_of_a_living_one_is_not(tmp_path):
    killed, living = tmp_path / ".a[1].json.123456.part", tmp_path / ".a[1].json.123457.part"
    other = tmp_path / ".b.json.123456.part"
    for file in (killed, living, other):
        file.write_text("half")
    for file in (killed, other):
        os.utime(file, (time.time() - 3600,) * 2)
    atomic_write(tmp_path / "a[1].json", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, other.name, "a[1].json"])


@SOON
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_refused_at_once(kind, tmp_path):
    file = tmp_path / "a.json"
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"cannot read .*a\.json: it is a pipe or a device, and no regular file"):
        read_text(file, 100)


@SOON
@pytest.mark.parametrize(
    ("command", "name"), [("card", "run_record.json"), ("plot", "run_record.json"), ("groups", "optimizer.pt")]
)
def test_commands_wait_for_no_pipe(command, name, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    assert main([command, str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-sai: cannot read {tmp_path / name}: it is")

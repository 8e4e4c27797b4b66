"""Files written whole or not at all, and nothing left lying about by a process that was killed."""

import os
import time

from hf_sai.runs.files import atomic_write


def test_the_part_of_a_killed_process_is_cleared_by_the_next_and_that_of_a_living_one_is_not(tmp_path):
    killed, living = tmp_path / ".a[1].json.123456.part", tmp_path / ".a[1].json.123457.part"
    other = tmp_path / ".b.json.123456.part"
    for file in (killed, living, other):
        file.write_text("half")
    for file in (killed, other):
        os.utime(file, (time.time() - 3600,) * 2)
    atomic_write(tmp_path / "a[1].json", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, other.name, "a[1].json"])

"""What processes have agreed on holds for their process group, and not for a later one of the same name."""

import gc

import pytest
import torch
import torch.distributed as dist

from hf_sai.distributed import copies


@pytest.fixture
def asked(monkeypatch):
    """What the members of a group answer each time that they are asked; each group is made by calling this."""
    answers = []

    def other_member(both, *_, **__):
        if not answers.pop():
            both[0] -= 1

    def join():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD

    monkeypatch.setattr(dist, "all_reduce", other_member)
    yield answers, join
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_is_asked_once_and_a_later_one_of_its_name_again(asked):
    answers, join = asked
    names = []
    for answer in (True, False, True):
        group = join()
        names.append(group.group_name)
        answers.append(answer)
        for _ in range(2):
            assert copies.agree(["a"], group, torch.device("cpu")) is answer
        assert not answers
        dist.destroy_process_group()
    assert len(set(names)) == 1


def test_nothing_is_remembered_of_a_group_that_is_gone(asked):
    answers, join = asked
    gc.collect()
    before = len(copies._AGREED)
    answers.append(True)
    copies.agree(["a"], join(), torch.device("cpu"))
    assert len(copies._AGREED) == before + 1
    dist.destroy_process_group()
    gc.collect()
    assert len(copies._AGREED) == before

"""Stretches know where they lie in the whole; shards refuse what was saved in other blocks. No process is started."""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_sai import SGDSaI
from hf_sai.distributed.exchange import owners_of
from hf_sai.distributed.stretch import Stretch


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (6, 1), (4, 3, 2)], ids=str)
def test_boxes_are_every_element_of_a_stretch_once_and_where_it_lies(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape[0], -1)
    for begin in range(whole.numel()):
        for end in range(begin + 1, whole.numel() + 1):
            stretch = Stretch(nn.Parameter(torch.zeros(end - begin)), {}, {})
            stretch.shape, stretch.start = torch.Size(shape), begin
            found = torch.full_like(whole, -1)
            for box, rows, columns in stretch.boxes(whole.view(-1)[begin:end]):
                assert (found[rows, columns] == -1).all()
                found[rows, columns] = box
            inside = (whole >= begin) & (whole < end)
            assert torch.equal(found, torch.where(inside, whole, -1))


def test_the_work_is_shared_out_by_cost():
    shapes = [torch.Size((4096, 4096))] * 4 + [torch.Size((4096, 14336))] * 3 + [torch.Size((1024, 4096))] * 2
    random.Random(0).shuffle(shapes)
    owners = owners_of(shapes, 4)
    work = [0] * 4
    for shape, owner in zip(shapes, owners, strict=True):
        work[owner] += shape.numel() * min(shape)
    assert sorted(set(owners)) == [0, 1, 2, 3]
    assert max(work) <= 1.5 * sum(work) / 4


@pytest.fixture
def first_of_two_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("first_of_two_processes")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_blocks_of_whole_parameters_are_refused_by_shards_and_values_are_not(kind):
    pytest.importorskip("bitsandbytes")
    from torch.distributed.fsdp import fully_shard

    assert dist.get_world_size() == 2
    whole = nn.Linear(128, 96)
    saved = SGDSaI(whole.named_parameters(), momentum_dtype=kind)
    whole(torch.ones(2, 128)).square().sum().backward()
    saved.step()
    model = fully_shard(nn.Linear(128, 96), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = SGDSaI(model.named_parameters(), momentum_dtype=kind)
    with pytest.raises(ValueError, match="in blocks of the whole parameter, of which \\(48, 128\\) lie here"):
        optimizer.load_state_dict(saved.state_dict())
    model(torch.ones(2, 128)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.uint8
    states = optimizer.state_dict()
    assert states["state"][0]["momentum_buffer"].dtype == torch.float32
    other = SGDSaI(model.named_parameters(), momentum_dtype=kind)
    other.load_state_dict(states)
    for key in ("momentum_buffer", "momentum_scales"):
        assert torch.equal(other.state[model.weight][key], optimizer.state[model.weight][key])

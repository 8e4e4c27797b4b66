"""What happens at the edges of a step: scalers, odd learning rates and gradients, exchanged parameters, memory."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from reference import ReferenceSGDSaI, assert_moved_alike
from torch import nn

from hf_sai import SGDSaI, measure_gsnr
from hf_sai.optim import gsnr, sgd_sai, stochastic
from hf_sai.optim.rules.rows import sum_of_squares

PATHS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
RULES = ["published", "rows", "factored"]


def gradient(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- GradScaler


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "left to the step"])
def test_an_overflow_in_the_first_step_measures_and_starts_nothing(fused, unscale):
    p = nn.Parameter(torch.ones(8))
    optimizer = SGDSaI([p], lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate((True, False)):
        optimizer.zero_grad()
        scaler.scale((p * gradient(8, step) * (torch.inf if bad else 1.0)).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert torch.equal(p.detach(), torch.ones(8))
            assert not optimizer.state.get(p, {}).get("gsnr")
            assert "momentum_buffer" not in optimizer.state.get(p, {})
    assert optimizer.state[p]["gsnr"] == measure_gsnr([gradient(8, 1)])[0]
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], gradient(8, 1))


# --- the learning rate


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("path", [*PATHS, {"foreach": False, "momentum_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (4, 4)], ids=str)
def test_a_learning_rate_of_one_element_is_a_number_whatever_its_shape(shape, path, update):
    moved = []
    for lr in (0.01, torch.tensor(0.01), torch.tensor([0.01]), torch.tensor([[0.01]], dtype=torch.float64)):
        p = nn.Parameter(gradient(shape, 5))
        optimizer = SGDSaI([p], lr=lr, update=update, **path)
        for step in range(2):
            p.grad = gradient(shape, step)
            optimizer.step()
        moved.append(p.detach())
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-5, atol=1e-7)


# --- gradients


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_expanded_gradient_is_an_ordinary_one(path, update):
    params = [nn.Parameter(gradient((4, 6), 9)) for _ in range(2)]
    start = params[0].detach().clone()
    for p, expands in zip(params, (True, False), strict=True):
        optimizer = SGDSaI([p], lr=1e-2, update=update, **path)
        for step in range(3):
            row = gradient((1, 6), step).expand(4, 6)
            p.grad = row if expands else row.contiguous()
            optimizer.step()
    assert_moved_alike(params[:1], params[1:], [start], rel=1e-5)


@pytest.mark.parametrize("update", RULES)
def test_momentum_that_goes_to_0_and_comes_back_starts_anew(update):
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = SGDSaI([p], lr=1e-2, update=update, momentum=0.9)
    for step, momentum in enumerate((0.9, 0.9, 0.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = gradient((4, 4), step)
        optimizer.step()
        assert ("momentum_buffer" in optimizer.state[p]) == (momentum != 0)
    if update == "published":
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], gradient((4, 4), 3))
    assert q.grad is None


@pytest.mark.slow
def test_sums_of_squares_of_a_large_strided_gradient_are_right():
    strided = torch.ones(1 << 12, 1 << 14).t()[:, ::2]
    assert sum_of_squares(strided, ()).item() == pytest.approx(strided.numel(), rel=1e-3)
    assert measure_gsnr([strided + gradient(strided.shape)])[0] > 0


@pytest.mark.parametrize(
    "make",
    [lambda: gradient((6, 50)).t(), lambda: gradient((12, 50))[::2, 1:], lambda: gradient((5, 3, 4)).permute(2, 0, 1)],
)
def test_pieces_of_any_strides_measure_as_the_whole(make, monkeypatch):
    g = make()
    whole = measure_gsnr([g])[0]
    monkeypatch.setattr(gsnr, "PIECE", 7)
    assert measure_gsnr([g])[0] == pytest.approx(whole, rel=1e-12)
    assert all(piece.numel() <= 7 for piece in gsnr._pieces(g))
    assert sum(piece.numel() for piece in gsnr._pieces(g)) == g.numel()


def test_meta_parameters_are_passed_over():
    p, q = nn.Parameter(torch.ones(3, device="meta")), nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3, device="meta"), gradient(3)
    optimizer = SGDSaI([p, q], lr=1e-2)
    optimizer.step()
    assert [row.measured for row in optimizer.gsnr_report()] == [False, True]
    assert not torch.equal(q.detach(), torch.ones(3))


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of tensors that operations make, at their most: a process's own peak may be of earlier tests."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                size = t.untyped_storage().nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(t, self.free, size)
        return result

    def free(self, size):
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_measuring_takes_pieces_of_a_few_megabytes(dtype, transposed):
    """The whole in float64 would be 8 bytes an element: of a tensor of 1.5e9 elements 12 GB."""
    g = torch.ones(1 << 13, 1 << 12, dtype=dtype)
    with LiveBytes() as memory:
        measure_gsnr([g.t() if transposed else g])
    assert 0 < memory.peak <= 64e6 < 8 * g.numel()


# --- exchanged parameters


def test_a_flat_tensor_that_nobody_owns_is_refused_before_the_first_update():
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(5))]
    optimizer = SGDSaI(params, lr=1e-2)
    flat = nn.Parameter(torch.ones(21))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = gradient(21)
    with pytest.raises(ValueError, match=r"with 2 parameters and now holds 1 tensors of other shapes, such as \(21,\)"):
        optimizer.step()
    assert torch.equal(flat.detach(), torch.ones(21))


def test_what_is_flattened_between_two_steps_is_refused_too():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SGDSaI([p], lr=1e-2)
    p.grad = gradient(p.shape)
    optimizer.step()
    flat = nn.Parameter(p.detach().flatten())
    flat.grad = gradient(16)
    before = flat.detach().clone()
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="Something has flattened"):
        optimizer.step()
    assert torch.equal(flat.detach(), before)


@pytest.mark.parametrize("stepped", [False, True])
def test_groups_and_parameters_may_be_taken_out(stepped):
    """As by those who freeze layers, or who make all groups anew."""
    first, second, third = params = [nn.Parameter(torch.ones(n, 4)) for n in (2, 3, 4)]
    optimizer = SGDSaI([{"params": [first]}, {"params": [second, third]}], lr=1e-2)
    for p in params:
        p.grad = gradient(p.shape)
    if stepped:
        optimizer.step()
    optimizer.param_groups[1]["params"].remove(second)
    optimizer.param_groups.pop(0)
    before = copy.deepcopy(params)
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, True, False]
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [second], "update": "factored"})
    optimizer.step()
    assert not torch.equal(second, before[1])


def test_parameters_exchanged_for_others_of_their_shape_are_trained():
    """As by mixed precision with copies in float32, and by accelerate under FSDP2."""
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(5))]
    optimizer = SGDSaI(params, lr=1e-2)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer.param_groups[0]["params"] = copies
    for p in copies:
        p.grad = gradient(p.shape)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_the_heap_is_not_searched(monkeypatch):
    def fail(*_):
        raise AssertionError("the heap was searched")

    monkeypatch.setattr(gc, "get_objects", fail)
    monkeypatch.setattr(gc, "get_referrers", fail)
    p = nn.Parameter(torch.ones(3))
    p.grad = gradient(3)
    optimizer = SGDSaI([p], lr=1e-2)
    optimizer.step()
    assert len(optimizer.gsnr_report()) == 1


# --- stochastic rounding on several processes


def rounded(monkeypatch, groups, steps, optimizer=None, options=None):
    monkeypatch.setattr(sgd_sai, "in_many_processes", lambda: True)
    params = [p for group in groups for p in group["params"]]
    optimizer = optimizer or SGDSaI(groups, lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
    for step in steps:
        for p in params:
            p.grad = gradient(p.shape, step).to(p.dtype)
        optimizer.step()
    return optimizer


def ones(n=2, seed=None):
    return [{"params": [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))]} for _ in range(n)]


def test_groups_of_equal_length_are_rounded_by_other_numbers(monkeypatch):
    groups = ones()
    rounded(monkeypatch, groups, range(1))
    first, second = (group["params"][0] for group in groups)
    assert not torch.equal(first, second)


def test_the_numbers_go_on_after_resume(monkeypatch):
    groups = ones()
    optimizer = rounded(monkeypatch, groups, range(2))
    copies = [{"params": [nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in groups]
    resumed = SGDSaI(copies, lr=1e-3, weight_decay=0.0, stochastic_rounding=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rounded(monkeypatch, groups, range(2, 4), optimizer)
    rounded(monkeypatch, copies, range(2, 4), resumed)
    for group, other in zip(groups, copies, strict=True):
        assert torch.equal(group["params"][0], other["params"][0])


def test_the_numbers_follow_from_the_runs_own_seed_and_step():
    drawn = []
    for gsnr_of_run, number, step in ((64.0, 0, 1), (64.1, 0, 1), (64.0, 1, 1), (64.0, 0, 2)):
        with stochastic.draw_alike(torch.device("cpu"), gsnr_of_run, number, step):
            drawn.append(torch.rand(4))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4


# --- warnings


def test_frozen_parameters_are_not_named_as_untrained(caplog):
    frozen, trained = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = SGDSaI([("frozen", frozen), ("trained", trained)], lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for step in range(sgd_sai.WARN_UNMEASURED_AFTER + 1):
            trained.grad = gradient(3, step)
            optimizer.step()
    assert not caplog.records


def test_a_loss_that_is_nan_from_the_start_is_called_that(caplog):
    p = nn.Parameter(torch.ones(3))
    optimizer = SGDSaI([("p", p)], lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(sgd_sai.WARN_UNMEASURED_AFTER):
            p.grad = torch.full((3,), torch.nan)
            optimizer.step()
    [record] = caplog.records
    assert "nothing is being trained" in record.getMessage()
    assert "loss that is not finite" in record.getMessage()


@pytest.mark.parametrize("update", RULES)
def test_every_path_moves_as_the_reference_from_the_first_step_on(update):
    for path in PATHS:
        p = nn.Parameter(gradient((12, 7), 3))
        start = p.detach().clone()
        optimizer = SGDSaI([p], lr=1e-2, update=update, **path)
        reference = ReferenceSGDSaI([p], lr=1e-2, update=update)
        for step in range(4):
            p.grad = gradient((12, 7), step)
            reference.step([p.grad])
            optimizer.step()
        assert_moved_alike([p], reference.params, [start], rel=1e-5)

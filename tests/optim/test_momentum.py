"""How the momentum is kept: near the reference in every format, the same after every way of saving it."""

import copy
import io
import pickle
import sys

import pytest
import torch
from reference import ReferenceSGDSaI
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sai import SGDSaI, sgd_sai
from hf_sai.optim import update
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import allocate, has_bitsandbytes, load, momentum_of
from hf_sai.runs.meters import state_bytes

SHAPES = [(96, 64), (4100,), (30, 7), (5,)]  # the last three are too small or too odd for some format


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, seed):
    """Gradients with a common part, as in training: a momentum of pure noise is nearly zero."""
    common, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    for p in params:
        gradient = torch.randn(p.shape, generator=common) + 0.5 * torch.randn(p.shape, generator=noise)
        p.grad = gradient.to(p.dtype)


def train(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()


def momenta(optimizer, params):
    return [load(momentum_of(optimizer.layout.part(p, optimizer.param_groups[0]))) for p in params]


@pytest.mark.parametrize(
    "path", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"fused": False}, {}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("momentum_dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4), ("8bit", 2e-2), ("4bit", 2e-1)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.0}], ids=str)
def test_every_format_stays_near_the_reference(momentum_dtype, tolerance, dtype, path, options):
    params = make_params(dtype)
    before = [p.detach().double().clone() for p in params]
    optimizer = SGDSaI(params, lr=1e-2, momentum_dtype=momentum_dtype, **options, **path)
    reference = ReferenceSGDSaI(params, lr=1e-2, **options)
    for step in range(6):
        set_gradients(params, step)
        reference.step([p.grad for p in params])
        optimizer.step()
    rounding = torch.finfo(dtype).eps
    for p, start, expected in zip(params, before, reference.params, strict=True):
        moved = (expected - start).norm()
        assert (p.detach().double() - expected).norm() <= tolerance * moved + 6 * rounding * expected.norm()


@pytest.mark.parametrize(
    ("momentum_dtype", "most"), [(None, 4.0), (torch.bfloat16, 2.0), ("8bit", 1.1), ("4bit", 0.6)], ids=str
)
def test_bytes_of_state_per_element(momentum_dtype, most):
    p = nn.Parameter(torch.randn(256, 512))
    optimizer = SGDSaI([p], momentum_dtype=momentum_dtype)
    train([p], optimizer, 1)
    assert state_bytes(optimizer) - 8 <= most * p.numel()  # 8: the g-SNR


@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
def test_small_tensors_keep_their_momentum_in_full_precision(momentum_dtype):
    params = make_params()
    optimizer = SGDSaI(params, momentum_dtype=momentum_dtype)
    train(params, optimizer, 1)
    assert [optimizer.state[p]["momentum_buffer"].dtype for p in params[2:]] == [torch.float32] * 2
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.uint8


@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (3, 4, 512), (4102,)], ids=str)
def test_a_quantised_momentum_is_within_half_a_code_of_what_was_stored(momentum_dtype, shape):
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    optimizer = SGDSaI([p], momentum_dtype=momentum_dtype)
    optimizer.step()
    momentum = momentum_of(optimizer.layout.part(p, optimizer.param_groups[0]))
    scales = momentum.scales.repeat_interleave(256 if momentum_dtype == "8bit" else 128)[: p.numel()].view(shape)
    worst = ((momentum.load() - p.grad).abs() / scales).max()
    assert worst <= (0.02 if momentum_dtype == "8bit" else 0.16)  # half the widest gap between codes


def through_torch_save(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, "8bit", "4bit"], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"])
def test_resume_is_exact(momentum_dtype, param_dtype, copied):
    params = make_params(param_dtype)
    optimizer = SGDSaI(params, lr=1e-2, momentum_dtype=momentum_dtype)
    train(params, optimizer, 3)

    resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = SGDSaI(resumed_params, lr=1e-2, momentum_dtype=momentum_dtype)
    resumed.load_state_dict(copied(optimizer.state_dict()))
    train(params, optimizer, 3, start=3)
    train(resumed_params, resumed, 3, start=3)
    for p, q in zip(params, resumed_params, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, "8bit", "4bit"], ids=str)
def test_a_pickled_or_deep_copied_optimizer_goes_on_alike(momentum_dtype):
    params = make_params()
    optimizer = SGDSaI(params, momentum_dtype=momentum_dtype)
    train(params, optimizer, 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(params, optimizer, 2, start=2)
    for other in copies:
        others = other.param_groups[0]["params"]
        train(others, other, 2, start=2)
        assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, "8bit", "4bit"], ids=str)
def test_a_checkpoint_from_before_the_option_is_converted(momentum_dtype):
    params = make_params()
    older = SGDSaI(params)
    train(params, older, 2)
    state_dict = copy.deepcopy(older.state_dict())
    for group in state_dict["param_groups"]:
        del group["momentum_dtype"], group["stochastic_rounding"]
    optimizer = SGDSaI(params, momentum_dtype=momentum_dtype)
    optimizer.load_state_dict(state_dict)
    assert optimizer.state[params[0]]["momentum_buffer"].dtype in (torch.bfloat16, torch.uint8)
    for ours, theirs in zip(momenta(optimizer, params), momenta(older, params), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.2 * theirs.abs().max().item())


def test_float32_momentum_of_bfloat16_parameters_survives_loading():
    params = make_params(torch.bfloat16)
    optimizer = SGDSaI(params, momentum_dtype=torch.float32)
    train(params, optimizer, 3)
    exact = [m.clone() for m in momenta(optimizer, params)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, exact, momenta(optimizer, params)))
    assert any(not torch.equal(m, m.bfloat16().float()) for m in exact)


def test_stochastic_rounding_keeps_updates_below_the_resolution_on_average():
    values = torch.ones(20_000, dtype=torch.bfloat16)
    stuck, moving = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    torch.manual_seed(0)
    for p, rounding in ((stuck, False), (moving, True)):
        optimizer = SGDSaI([p], lr=1e-5, momentum=0.0, weight_decay=0.0, stochastic_rounding=rounding)
        gradient = torch.ones_like(p)
        gradient[::2] = -1.0
        p.grad = gradient
        optimizer.step()
    expected = 1.0 - 1e-5 * (20_000**0.5) * gradient.double()  # 1.4e-3 away, a fifth of bfloat16's step at 1
    assert torch.equal(stuck, values)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert moving.detach()[part].double().mean().item() == pytest.approx(expected[part].mean().item(), abs=2e-4)


def test_stochastic_rounding_does_not_touch_float32_or_make_infinities():
    a, b = make_params(), make_params()
    first, second = SGDSaI(a, stochastic_rounding=True), SGDSaI(b)
    train(a, first, 3)
    train(b, second, 3)
    assert all(map(torch.equal, a, b))
    p = nn.Parameter(torch.full((4,), float("inf"), dtype=torch.bfloat16))
    p.grad = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.bfloat16)
    SGDSaI([p], stochastic_rounding=True).step()
    assert torch.isinf(p).all()


def test_what_momentum_dtype_cannot_be():
    with pytest.raises(ValueError, match=r"momentum_dtype must be float32, .*, 8bit, 4bit or none, but is '3bit'"):
        SGDSaI(make_params(), momentum_dtype="3bit")
    with pytest.raises(ValueError, match=r"but is torch\.int8"):
        SGDSaI(make_params(), momentum_dtype=torch.int8)


def test_without_bitsandbytes_the_same_codes_are_written(monkeypatch):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    states = []
    for there in (True, False):
        monkeypatch.setattr("hf_sai.optim.momentum.find_spec", lambda name, there=there: there or None)
        has_bitsandbytes.cache_clear()
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = SGDSaI([p], momentum_dtype="8bit", foreach=False)
        p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        states.append(optimizer.state[p])
    has_bitsandbytes.cache_clear()
    same = (states[0]["momentum_buffer"] == states[1]["momentum_buffer"]).float().mean()
    assert same > 0.99  # bitsandbytes' own kernel decides near ties in another way
    assert torch.equal(states[0]["momentum_scales"], states[1]["momentum_scales"])


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_broken_bitsandbytes_costs_a_warning_and_no_training(monkeypatch, caplog, kind):
    monkeypatch.setattr("hf_sai.optim.momentum.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    has_bitsandbytes.cache_clear()
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = SGDSaI([p], momentum_dtype=kind, foreach=False)
    try:
        for _ in range(2):
            p.grad = torch.randn(64, 64)
            optimizer.step()
    finally:
        has_bitsandbytes.cache_clear()
    assert p.detach().count_nonzero() == p.numel()
    assert caplog.text.count("bitsandbytes does not work here") == 1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_values_that_were_loaded_are_stored_as_the_same_again(kind, sign):
    """In 8 bits no code is -1: stored plainly, a block whose largest element is negative would shrink by 0.7 %."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(100, 77, generator=generator).exp() * sign)
    p.data[3:7] *= 1e-6
    p.data[20:30] = 0
    part = Part(p, {"momentum_dtype": kind}, {})
    allocate(part)
    first = momentum_of(part)
    first.store(p.detach())
    again = Part(p, part.group, {})
    allocate(again)
    momentum_of(again).store_loaded(first.load())
    assert torch.equal(momentum_of(again).load(), first.load())
    momentum_of(again).store(first.load())
    assert torch.equal(momentum_of(again).load(), first.load()) == (kind == "4bit" or sign == 1)


# --- temporary memory


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made = max(self.made, t.untyped_storage().nbytes())
        return result


def in_pieces(kind, rows, transposed):
    """(parameter, momentum, bytes of the largest temporary tensor) after a step of a large tensor."""
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "4bit" else torch.bfloat16
    p = nn.Parameter(torch.randn(rows, 96).to(dtype))
    if transposed:
        p = nn.Parameter(p.detach().t().contiguous().t())
    momentum_dtype = None if kind == "rounding" else torch.float32 if kind == "float32" else kind
    optimizer = SGDSaI([p], momentum_dtype=momentum_dtype, stochastic_rounding=kind == "rounding", foreach=False)
    p.grad = torch.randn(p.shape).to(dtype)
    optimizer.step()  # measures, and starts the momentum
    m = momentum_of(optimizer.layout.part(p, optimizer.param_groups[0]))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "stochastic_rounding": kind == "rounding"}
    with Largest() as largest, torch.no_grad():
        sgd_sai([p], [p.grad], [m], [1.0], **options, foreach=False)
    return p.detach(), load(m), largest.made


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("kind", ["8bit", "4bit", "float32", "rounding"])
def test_temporary_memory_does_not_grow_with_the_tensor(kind, transposed, monkeypatch):
    whole, of_whole, most = in_pieces(kind, 1001, transposed)
    assert most >= 4 * whole.numel()  # one piece, so that a copy of the tensor is seen
    monkeypatch.setattr(update, "_PIECE", 1 << 12)
    p, m, made = in_pieces(kind, 1001, transposed)
    assert 0 < made <= 4 * (1 << 12)
    assert torch.equal(m, of_whole)
    if not (kind == "rounding" and transposed):  # the same numbers are drawn, and there for other elements
        assert torch.equal(p, whole)

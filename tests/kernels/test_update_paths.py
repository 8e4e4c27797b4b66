"""Every way to make one step, in one table: each equals the plain loop, for any tensors and options."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sai import sgd_sai
from hf_sai.kernels import choice, numba_plain
from hf_sai.optim import update
from hf_sai.optim.momentum import QuantizedMomentum

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="Triton's interpreter is not there"
)


def use_triton_on_cpu(monkeypatch):
    """Let Triton's interpreter update what lies on the CPU, before all others (see conftest.py)."""
    from hf_sai.kernels import triton_step

    kernel = update.Kernel(
        "triton",
        lambda *_: lambda p, g, m, factors: triton_step.can_update(p, g, m),
        triton_step.update,
        unscales=True,
        looks_ahead=True,
    )
    monkeypatch.setattr(update, "KERNELS", [kernel])


@pytest.fixture(
    params=["foreach", "fused", "fused, torch's kernel", "automatic", pytest.param("triton", marks=needs_triton)]
)
def step(request, monkeypatch):
    """One way to make a step: called as sgd_sai is."""
    if request.param == "triton":
        use_triton_on_cpu(monkeypatch)
    elif request.param == "fused, torch's kernel":
        monkeypatch.setattr(choice, "_imported", lambda name: None)
    asked = {"foreach": {"foreach": True}, "automatic": {}}.get(request.param, {"fused": True})
    return lambda *lists, **options: sgd_sai(*lists, **options, **asked)


@dataclass
class Tensors:
    params: list
    grads: list
    buffers: list
    scales: list

    def copy(self, dtype=None):
        """The same values in memory of their own, with the same strides."""
        copies = [
            [t.clone() if dtype is None else t.to(dtype) for t in x] for x in (self.params, self.grads, self.buffers)
        ]
        return Tensors(*copies, self.scales)

    def lists(self):
        return self.params, self.grads, self.buffers, self.scales


@st.composite
def tensors(draw, dtypes=DTYPES):
    """Up to five tensors of any of the dtypes, sizes and memory layouts, with gradients and momentum."""
    made = Tensors([], [], [], [])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.sampled_from([(0,), (1,), (3, 0), (), (7,), (63,), (64,), (65, 3), (4099,), (2, 3, 5)]))
        dtype = draw(st.sampled_from(dtypes))
        for of_kind in (made.params, made.grads, made.buffers):
            t = torch.randn(shape, generator=generator).to(dtype)
            transposed = len(shape) > 1 and draw(st.booleans())
            of_kind.append(t.transpose(0, 1).contiguous().transpose(0, 1) if transposed else t)
        made.scales.append(draw(st.floats(0.01, 100)))
    return made


options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "momentum": st.sampled_from([0.0, 0.3, 0.9]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "maximize": st.booleans(),
    }
)


def assert_equal_to_rounding(made, expected, start, lr, steps):
    """Within a few roundings of the numbers that are added up, and, where these are small, of the movement."""
    for i, scale in enumerate(made.scales):
        of_momentum = max((t.abs().max().item() for t in (start.grads[i], start.buffers[i]) if t.numel()), default=0)
        of_param = start.params[i].abs().max().item() if start.params[i].numel() else 0
        of_param += steps * lr * scale * of_momentum
        for kind, largest in (("params", of_param), ("buffers", of_momentum)):
            ours, theirs, begun = (getattr(x, kind)[i] for x in (made, expected, start))
            rounding = 3 * steps * torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * largest)
            moved = (theirs.double() - begun.double()).norm()
            if moved > 10 * rounding * largest * ours.numel() ** 0.5:  # more than rounding: then a step not made shows
                assert (ours.double() - theirs.double()).norm() < 0.2 * moved


@settings(max_examples=25, deadline=None, derandomize=True)
@given(made=tensors(), options=options, lr_is_a_tensor=st.booleans(), steps=st.integers(1, 3))
def check_against_the_plain_loop(step, made, options, lr_is_a_tensor, steps):
    start, expected = made.copy(), made.copy()
    lr = options["lr"]
    if lr_is_a_tensor:
        options = {**options, "lr": torch.tensor(lr, dtype=torch.float64)}
    for _ in range(steps):
        step(*made.lists(), **options)
        sgd_sai(*expected.lists(), **options, foreach=False)
    assert_equal_to_rounding(made, expected, start, lr, steps)
    assert all(map(torch.equal, made.grads, start.grads))


def test_every_path_equals_the_plain_loop(step):
    check_against_the_plain_loop(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(numba_plain, "_MIN_ELEMENTS_FOR_THREADS", 0)
    torch.manual_seed(0)
    params, grads, buffers = ([torch.randn(n, dtype=dtype) for n in (1, 1000, 129, 64)] for _ in range(3))
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        mine = [[t.clone() for t in x] for x in (params, grads, buffers)]
        sgd_sai(*mine, [1.0, 2.0, 3.0, 4.0], lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
        results.append(mine[0] + mine[2])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kind", ["fused", "fused, torch's kernel", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_fused_paths_unscale_gradients_and_skip_on_inf(kind, found_inf, momentum, nesterov, monkeypatch):
    if nesterov and kind == "fused, torch's kernel":
        pytest.skip("torch's kernel does not look ahead as we do, and is not asked")
    if kind == "triton":
        use_triton_on_cpu(monkeypatch)
    elif kind != "fused":
        monkeypatch.setattr(choice, "_imported", lambda name: None)
    p, g, m = (torch.randn(100) for _ in range(3))
    q, n = p.clone(), m.clone()
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.1}
    if found_inf != 1.0:
        sgd_sai([q], [g], [n], [2.0], **options, foreach=False)
    amp = {"grad_scale": torch.tensor(1024.0), "found_inf": None if found_inf is None else torch.tensor(found_inf)}
    sgd_sai([p], [g * 1024], [m], [2.0], **options, **amp, fused=True)
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(m, n)


def test_paths_that_cannot_unscale_say_so_and_change_nothing():
    p = torch.ones(3)
    for asked in ({"foreach": True}, {"foreach": False}):
        with pytest.raises(ValueError, match="unscale the gradients before"):
            sgd_sai([p], [p], [p], [1.0], lr=0.1, momentum=0.9, weight_decay=0.0, found_inf=torch.zeros(1), **asked)
    assert torch.equal(p, torch.ones(3))


# --- which path


def path_of(p, g=None, m=None, factors=(), foreach=None, fused=None, stochastic_rounding=False, nesterov=False):
    asked = update.Choice(foreach, fused, stochastic_rounding, nesterov)
    offers = update._offers(p.device, asked)
    taken = update._path(p, p if g is None else g, p if m is None else m, factors, asked, offers)
    return taken.name


def test_numba_is_used_when_asked_for_or_when_nothing_is_said():
    p = torch.ones(3)
    assert path_of(p, fused=True) == path_of(p) == "numba_plain"
    assert path_of(p, factors=(p,)) == "numba_factored"
    assert path_of(p.bfloat16(), fused=True) == path_of(p.bfloat16()) == "single_tensor"
    assert path_of(p, foreach=True) == "multi_tensor"
    assert path_of(p, foreach=False) == path_of(p, fused=False) == "single_tensor"


@pytest.mark.parametrize("choice", [{"fused": True}, {}], ids=str)
def test_a_momentum_in_fewer_bits_has_paths_of_its_own(choice):
    p = torch.zeros(64, 64)
    quantised = QuantizedMomentum(torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(16), p.shape)
    for m in (quantised, p.bfloat16()):
        assert path_of(p, m=m, **choice) == "numba_lowbit"
        assert path_of(p, m=m, foreach=False) == "widened"
    assert path_of(p.bfloat16(), m=quantised, **choice) == "bitsandbytes_8bit"
    assert path_of(p.bfloat16(), m=quantised, stochastic_rounding=True, **choice) == "widened"


def test_without_numba_torchs_kernel_takes_over(monkeypatch):
    monkeypatch.setattr(choice, "_imported", lambda name: None)
    assert path_of(torch.ones(3), fused=True) == path_of(torch.ones(3)) == "torch_fused"


@pytest.mark.parametrize("asked", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_in_another_dtype_is_left_behind_and_looked_ahead_of_alike(asked, nesterov):
    p, g, m = torch.zeros(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16), torch.zeros(8)
    sgd_sai([p], [g], [m], [1.0], lr=1.0, momentum=0.5, nesterov=nesterov, weight_decay=0.0, **asked)
    assert m.tolist() == [0.5] * 8
    assert p.tolist() == [-0.75 if nesterov else -0.5] * 8


def test_with_nesterov_no_path_is_asked_that_does_not_look_ahead(monkeypatch):
    p = torch.zeros(64, 64)
    quantised = QuantizedMomentum(torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(16), p.shape)
    assert path_of(p, nesterov=True) == "numba_plain"
    assert path_of(p.bfloat16(), m=quantised, nesterov=True) == "widened"  # not bitsandbytes'
    assert update.can_unscale(p, update.Choice(None, True, nesterov=True))
    monkeypatch.setattr(choice, "_imported", lambda name: None)
    assert path_of(p, fused=True, nesterov=True) == "single_tensor"  # not torch's
    assert not update.can_unscale(p, update.Choice(None, True, nesterov=True))


@pytest.mark.parametrize("error", [ImportError("not for this numpy"), RuntimeError("no C compiler")], ids=str)
def test_a_compiler_that_is_broken_ends_no_training_and_one_that_is_missing_says_nothing(monkeypatch, caplog, error):
    def fail(name):
        raise error

    monkeypatch.setattr(choice.importlib, "import_module", fail)
    assert choice._imported.__wrapped__("numba_plain") is None
    warned = "numba_plain does not work here (RuntimeError: no C compiler)" in caplog.text
    assert warned == bool(caplog.records) == isinstance(error, RuntimeError)


# --- sizes are checked before a kernel gets an address


def _wrong(shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("which", ["g", "m", "quantised codes", "quantised scales", "bfloat16 m"])
@pytest.mark.parametrize("kernel", [k.name for k in update.KERNELS])
@pytest.mark.parametrize("size", [32, 128], ids=["too small", "too large"])
def test_no_kernel_takes_tensors_of_other_sizes(kernel, which, size):
    [kernel] = [k for k in update.KERNELS if k.name == kernel]
    p = torch.zeros(64, 64)
    tensors = {"g": torch.zeros(64, 64), "m": torch.zeros(64, 64)}
    codes, scales = torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(16)
    if which in tensors:
        tensors[which] = _wrong((size, 64))
    elif which == "bfloat16 m":
        tensors["m"] = _wrong((size, 64), torch.bfloat16)
    elif which == "quantised codes":
        tensors["m"] = QuantizedMomentum(_wrong((size, 64), torch.uint8), scales, p.shape)
    else:
        tensors["m"] = QuantizedMomentum(codes, _wrong((size // 8 - 2,)), p.shape)
    for factors in ((), (torch.ones(64, 1), torch.ones(1, 64))):
        assert not kernel.takes(p, tensors["g"], tensors["m"], factors, update.Choice(None, True))


def test_factors_of_other_sizes_are_refused():
    p, g, m = torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)
    for factors in ((torch.ones(4, 1), torch.ones(1, 8)), (torch.ones(8, 1), torch.ones(1, 9)), (torch.ones(3),)):
        with pytest.raises((ValueError, RuntimeError)):
            sgd_sai([p], [g], [m], [1.0], lr=0.1, momentum=0.9, weight_decay=0.0, grad_factors=[factors], fused=True)


# --- devices


def test_what_lies_on_another_device_goes_to_that_of_the_tensors():
    """Learning rate, scale and flag of one device must not reach tensors of another (meta stands for a second GPU)."""
    there = torch.device("meta")
    assert update._rate_on(torch.tensor(0.5), there) == 0.5  # a number on the host needs no device
    assert update._rate_on(torch.ones(1, device=there), there).shape == ()
    assert update._on(torch.ones(1), there).device == there
    seen = []
    kernel = update.Kernel(
        "spy", lambda *_: lambda *_: True, lambda params, *_, **more: seen.append((params, more)), unscales=True
    )
    on_cpu, on_meta = torch.zeros(3), torch.zeros(3, device=there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "KERNELS", [kernel])
        sgd_sai([on_cpu, on_meta], [on_cpu, on_meta], [None] * 2, [1.0] * 2, lr=torch.tensor([0.5]), momentum=0.0,
                weight_decay=0.0, grad_scale=torch.ones(1), found_inf=torch.zeros(1), fused=True)  # fmt: skip
    assert [params[0].device.type for params, _ in seen] == ["cpu", "meta"]
    for params, more in seen:
        assert more["grad_scale"].device == more["found_inf"].device == params[0].device
        assert isinstance(more["lr"], float) or more["lr"].device == params[0].device


# --- threads


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_fails_in_a_thread_fails(bad, monkeypatch):
    monkeypatch.setattr(numba_plain, "_MIN_ELEMENTS_FOR_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def run(share):
        if bad in share[:, 0]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        numba_plain.in_shares([640] * 3, run)


# --- more elements than 32 bits count


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[2**31 + 7, 5, 2**33, 0, 1], [1, 2, 3], [64] * 9, []], ids=str)
def test_shares_of_threads_cover_every_element_once(sizes, threads):
    shares = numba_plain.shares(sizes, threads)
    assert len(shares) == threads
    pieces = [piece for share in shares for piece in share]
    for index, size in enumerate(sizes):
        mine = [(start, stop) for number, start, stop in pieces if number == index]
        assert [start for start, _ in mine] == [0, *(stop for _, stop in mine)][: len(mine)]
        assert (mine[-1][1] if mine else 0) == size
    fair = sum(sizes) / threads
    assert all(abs(sum(stop - start for _, start, stop in share) - fair) <= 64 * threads for share in shares)


# --- on a GPU


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("choice", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_paths_on_cuda_equal_the_plain_loop_and_do_not_synchronise(choice, lr_on_device):
    torch.manual_seed(0)
    shapes = [(300, 70), (1,), (4099,), *[(64, 64)] * 300]
    params, grads, buffers = ([torch.randn(shape, device="cuda") for shape in shapes] for _ in range(3))
    expected = [[t.clone() for t in x] for x in (params, grads, buffers)]
    lr = torch.tensor(0.1, device="cuda") if lr_on_device else 0.1
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    scales = [1.0] * len(shapes)
    sgd_sai(params, grads, buffers, scales, **options, **choice)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sgd_sai(params, grads, buffers, scales, **options, **choice)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        sgd_sai(*expected, scales, **options, foreach=False)
    torch.testing.assert_close(params, expected[0])
    torch.testing.assert_close(buffers, expected[2])


@needs_cuda
@pytest.mark.gpu
def test_one_launch_updates_all_tensors_on_cuda():
    tensors = [[torch.randn(1000, device="cuda") for _ in range(300)] for _ in range(3)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "fused": True}
    sgd_sai(*tensors, [1.0] * 300, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sgd_sai(*tensors, [1.0] * 300, **options)
    assert sum(event.count for event in profile.key_averages() if "Memcpy" not in event.key) <= 2


@needs_cuda
@pytest.mark.gpu
def test_a_step_can_be_captured_in_a_cuda_graph():
    p, g, m = (torch.randn(1000, device="cuda") for _ in range(3))
    q, n = p.clone(), m.clone()
    options = {"lr": torch.tensor(0.1, device="cuda"), "momentum": 0.9, "weight_decay": 0.1}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sgd_sai([p], [g], [m], [2.0], **options)
    for _ in range(3):
        graph.replay()
        sgd_sai([q], [g], [n], [2.0], **options, foreach=False)
    torch.testing.assert_close(p, q)

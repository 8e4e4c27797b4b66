"""Triton's kernels against the reference, for every momentum and rule: interpreted on CPU, the real ones on a GPU."""

import copy

import pytest
import torch
from reference import ReferenceSGDSaI, assert_moved_alike
from torch import nn

from hf_sai import SGDSaI, sgd_sai
from hf_sai.kernels import choice  # noqa: F401 - fills KERNELS
from hf_sai.optim import update
from hf_sai.optim.codes import QUANTIZED
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import QuantizedMomentum, allocate, load, momentum_of, store
from hf_sai.optim.rules import RULES, factored

pytest.importorskip("triton")
from hf_sai.kernels import triton_factored, triton_step, triton_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SHAPES = [(40, 130), (6, 3, 2, 2), (1, 70), (70, 1), (300,), (1,), (), (2, 2100)]
FORMATS = [None, torch.bfloat16, torch.float16, "8bit", "4bit"]
ALL_KERNELS = list(update.KERNELS)
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    """Every step by Triton's kernels, also on the CPU; what they do not take has no other kernel."""

    def offers(device, asked):
        return triton_step.can_update if asked.fused else None

    kernels = [
        update.Kernel(
            "triton", offers, triton_step.update, unscales=True, rounds=True, looks_ahead=True, multiplies=multiplies
        )
        for multiplies in (True, False)
    ]
    monkeypatch.setattr(update, "KERNELS", kernels)
    monkeypatch.setattr(factored, "FASTER", [])
    if DEVICE == "cpu":  # small tiles for small tensors, since the interpreter is slow
        for name, size in (("TILE_ROWS", 32), ("TILE_COLUMNS", 64), ("LINE", 128)):
            monkeypatch.setattr(triton_factored, name, size)


def sums_by_triton(monkeypatch):
    monkeypatch.setattr(factored, "FASTER", [lambda parts: triton_factored.factors(dict(enumerate(parts)))])


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]


def set_gradients(params, seed, common=7):
    """Gradients with a common part, as in training; their rows are of very different sizes."""
    alike, noise = torch.Generator().manual_seed(common), torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=alike) + 0.5 * torch.randn(p.shape, generator=noise)
        if g.ndim > 1 and len(g) > 1:
            g *= torch.logspace(-2, 1, len(g)).view(-1, *[1] * (g.ndim - 1))
        p.grad = g.to(p.device, p.dtype)


@pytest.mark.parametrize("how", ["published", "rows", "factored"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {}) for dtype in ROUNDING),
        (torch.float32, {"maximize": True, "weight_decay": 0.0}),
        (torch.float32, {"nesterov": True, "momentum": 0.8}),
    ],
    ids=str,
)
def test_parameters_move_as_the_references_do(how, dtype, options, monkeypatch):
    sums_by_triton(monkeypatch)
    params = parameters(dtype)
    params += [nn.Parameter(torch.empty(0, 3, device=DEVICE, dtype=dtype))]
    start = [p.detach().clone() for p in params]
    rate = 4.0  # so that parameters move by more than their dtype rounds
    optimizer = SGDSaI(params, lr=rate, update=how, fused=True, **options)
    reference = ReferenceSGDSaI(params[:-1], lr=rate, update=how, **options)
    for step in range(3):
        set_gradients(params, step)
        reference.step([p.grad for p in params[:-1]])
        optimizer.step()
    assert_moved_alike(params[:-1], reference.params, start[:-1], rel=ROUNDING[dtype])


@pytest.mark.parametrize("kind", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("shape", "nesterov"), [((), False), ((64, 66), True), ((5001,), False)], ids=str)
def test_a_step_with_any_momentum_is_that_of_the_plain_loop(kind, dtype, shape, nesterov):
    p = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    part = Part(p, {"momentum_dtype": kind}, {})
    allocate(part)
    m = momentum_of(part)
    store(m, torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE))
    assert triton_step.can_update(p, g, m)
    q, n, begun = p.clone(), copy.deepcopy(m), p.clone()
    settings = {"lr": 0.5, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    sgd_sai([p], [g], [m], [3.0], **settings, fused=True)
    sgd_sai([q], [g], [n], [3.0], **settings, foreach=False)
    assert_moved_alike([p], [q], [begun], rel=ROUNDING[dtype])
    if isinstance(m, QuantizedMomentum):  # next to a midpoint either neighbour may come, as with bitsandbytes
        assert (m.codes != n.codes).float().mean() < 2e-2
        torch.testing.assert_close(m.scales, n.scales, rtol=1e-5, atol=0.0)
    else:
        torch.testing.assert_close(load(m), load(n), rtol=2e-2 if m.dtype != torch.float32 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(QUANTIZED))
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_pass_for_a_number(kind, bad):
    p, g = torch.zeros(64, 64, device=DEVICE), torch.ones(64, 64, device=DEVICE)
    part = Part(p, {"momentum_dtype": kind}, {})
    allocate(part)
    g[0, 0] = bad
    sgd_sai([p], [g], [momentum_of(part)], [1.0], lr=0.1, momentum=0.9, weight_decay=0.0, fused=True)
    per_scale = QUANTIZED[kind]
    assert not p[0, 0].isfinite()
    assert not load(momentum_of(part)).flatten()[:per_scale].isfinite().all()
    assert load(momentum_of(part)).flatten()[per_scale:].isfinite().all()


# --- sums of squares


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")], ids=str)
def test_factors_and_running_means_are_the_plain_paths(dtype, bad, monkeypatch):
    shapes = [*SHAPES, (140, 130), (5, 300)]  # several tiles, and a line of more than one turn
    ours, theirs = parameters(dtype, shapes), parameters(dtype, shapes)
    kept = []
    for params in (ours, theirs):
        optimizer = SGDSaI(params, update="factored", foreach=False)
        for step in range(2):
            set_gradients(params, step)
            if step == 0:
                optimizer.step()
        for p in params if bad else ():
            p.grad.view(-1)[0] = bad
        kept.append((optimizer, optimizer.layout.parts()))
    (_, mine), (_, plain) = kept
    found = triton_factored.factors(dict(enumerate(mine)))
    for index, expected in enumerate(RULES["factored"].factors(plain)):
        assert [f.shape for f in found[index]] == [f.shape for f in expected]
        for f, other in zip(found[index], expected, strict=True):
            torch.testing.assert_close(f, other.float(), rtol=2e-5, atol=0.0)
        for key, value in mine[index].state.items():
            if key in factored.MEAN_SQUARES:
                torch.testing.assert_close(value, plain[index].state[key], rtol=1e-5, atol=0.0)
        assert mine[index].state["averaged_steps"] == 2


def test_a_step_of_all_tensors_is_two_launches(monkeypatch):
    sums_by_triton(monkeypatch)
    params = parameters()
    optimizer = SGDSaI(params, update="factored", fused=True)
    set_gradients(params, 0)
    optimizer.step()
    launches = []
    for module, kernel in ((triton_step, "_step"), (triton_factored, "_add_squares")):
        monkeypatch.setattr(module, kernel, _Counted(getattr(module, kernel), launches))
    set_gradients(params, 1)
    optimizer.step()
    assert len(launches) == 2


class _Counted:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


# --- rounding at random


def rounded_steps(seed, steps=1, size=40_000, start=1.0, step=2.0**-10):
    """bfloat16 parameters of 1, moved by an eighth of their resolution."""
    torch.manual_seed(seed)
    p = torch.full((size,), start, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(steps):
        sgd_sai([p], [torch.full_like(p, -1.0)], [None], [1.0], lr=step, momentum=0.0, weight_decay=0.0, fused=True,
                stochastic_rounding=True)  # fmt: skip
    return p


def test_updates_below_the_resolution_count_on_average():
    p = rounded_steps(0).double().cpu()
    assert set(p.unique().tolist()) == {1.0, 1 + 2.0**-7}
    deviation = 2.0**-7 * (0.125 * 0.875 / p.numel()) ** 0.5
    assert abs(p.mean() - 1 - 2.0**-10) < 4 * deviation


def test_random_numbers_follow_from_torchs_seed_and_differ_from_step_to_step():
    assert torch.equal(rounded_steps(0, 2), rounded_steps(0, 2))
    first, other = (rounded_steps(seed).double().cpu() - 1 > 0 for seed in (0, 1))
    together = (first & other).double().mean()
    assert abs(together - 0.125**2) < 4 * (0.125**2 / first.numel()) ** 0.5  # independent
    halves = first.view(2, -1).double()
    assert abs(torch.corrcoef(halves)[0, 1]) < 4 / halves.shape[1] ** 0.5
    blocks = first[: 19 * triton_step.BLOCK].view(19, -1)
    assert len(blocks.unique(dim=0)) == 19


def test_what_is_not_finite_stays_so_when_rounded():
    p = torch.tensor([float("inf"), float("nan"), -float("inf"), 1.0], dtype=torch.bfloat16, device=DEVICE)
    g = torch.zeros_like(p)
    sgd_sai([p], [g], [None], [1.0], lr=0.1, momentum=0.0, weight_decay=0.0, fused=True, stochastic_rounding=True)
    assert p[0] == float("inf")
    assert p[1].isnan()
    assert p[2] == -float("inf")
    assert p[3] == 1.0


# --- tables


def test_a_table_is_kept_while_no_address_changes():
    def table(*rows):
        return triton_tables.kept_table("test", torch.device(DEVICE), rows, [2, 1])

    first = table([16, 32], [48, 64])
    assert table([16, 32], [48, 64]) is first
    assert first.on_device.tolist() == [[0, 2], [16, 32], [48, 64]]
    assert first.owners.tolist() == [0, 0, 1]
    other = table([16, 32], [48, 80])
    assert other is not first
    assert other.on_device.tolist()[-1] == [48, 80]
    assert other.owners is first.owners


def test_tables_are_made_on_the_cpu_whatever_the_default_device_is():
    triton_step._code_tables.cache_clear()
    with torch.device("meta"):
        table = triton_tables.kept_table("test", torch.device(DEVICE), [[112, 128]], [2, 1])
        assert triton_tables.float_bits([1.0]) == [0x3FF0000000000000]
        codes = triton_step._code_tables("4bit", torch.device(DEVICE))
    assert table.on_device.tolist() == [[0, 2], [112, 128]]
    assert table.owners.tolist() == [0, 0, 1]
    assert [t.device.type for t in codes] == [DEVICE] * 3


def test_programs_cover_every_element_once_beyond_32_bits():
    sizes = [2**31 + 7, 5, 2**32]
    programs = [-(-size // triton_step.BLOCK) for size in sizes]
    owners = triton_tables.tensor_of_program(programs)
    assert torch.bincount(owners).tolist() == programs
    assert torch.equal(owners, owners.sort().values)


@pytest.mark.skipif(DEVICE != "cpu", reason="addresses outside of what is allocated")
def test_elements_beyond_32_bits_are_found():
    p, g, m = torch.ones(10), torch.ones(10), torch.zeros(10)
    beyond = 2**31  # elements before those that exist: the tensors' addresses are moved down by as many
    rows = [[-beyond // triton_step.BLOCK], *[[t.data_ptr() - beyond * 4] for t in (p, g, m)], [0], [0], [0], [10]]
    table = torch.tensor([*rows, [beyond + 10], triton_tables.float_bits([1.0])])
    triton_step._step[(1,)](
        table, torch.zeros(1, dtype=torch.int32), 1, 1.0, 0.0, 0.5, 0.5, 1.0, None, None, None, None, None, None,
        p_dtype=triton_step.tl.float32, g_dtype=triton_step.tl.float32, m_dtype=triton_step.tl.float32, per_scale=0,
        four_bits=False, normalised=False, lr_on_device=False, aligned=False, block_size=triton_step.BLOCK,
    )  # fmt: skip
    assert torch.equal(m, torch.full((10,), 0.5))
    assert torch.equal(p, torch.full((10,), 0.5))


# --- what is not taken


def test_what_the_kernels_do_not_take_is_refused():
    p = torch.zeros(8, 6, device=DEVICE)
    assert triton_step.can_update(p, p, p)
    assert not triton_step.can_update(p.T, p.T, p.T)
    assert not triton_step.can_update(p, p.T.contiguous().T, p)
    assert not triton_step.can_update(p.double(), p.double(), None)
    assert not triton_step.can_update(p, p[:4].contiguous(), p)
    rows, columns = torch.ones(8, 1, device=DEVICE), torch.ones(1, 6, device=DEVICE)
    for good in ((rows,), (columns,), (rows, columns)):
        assert triton_step.can_update(p, p, p, good)
    for bad in ((columns, rows), (rows[:4],), (rows.double(),)):
        assert not triton_step.can_update(p, p, p, bad)
    square, ones = torch.zeros(6, 6, device=DEVICE), torch.ones(6, 1, device=DEVICE)
    assert triton_step.factor_addresses(square, (columns,)) == (0, columns.data_ptr())
    assert triton_step.factor_addresses(square, (ones,)) == (ones.data_ptr(), 0)
    assert triton_step.factor_addresses(square, (columns, ones)) is None


def test_triton_is_used_on_cuda_only_when_asked_for():
    [kernel] = [k for k in ALL_KERNELS if k.name == "triton_step"]
    p = torch.zeros(3, device=DEVICE)
    for asked in ({"foreach": None, "fused": None}, {"foreach": True, "fused": None}, {"foreach": None, "fused": True}):
        taken = kernel.takes(p, p, p, (), update.Choice(**asked))
        assert taken == (DEVICE == "cuda" and bool(asked["fused"]))

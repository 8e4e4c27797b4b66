"""Part 1: every rule and path on the device against the plain reference of the tests, and that no step waits.

    python -m benchmarks.gpu.correctness --output runs/gpu

Each case leaves how far it is off, as a share of what is allowed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.contenders import PATHS, RULES, groups_of, kernels, needed
from benchmarks.gpu.part import ROOT, Part
from hf_sai import SGDSaI, sgd_sai

sys.path.append(str(ROOT / "tests"))
from reference import ReferenceSGDSaI

#: Odd sizes, more dimensions, one element, none, and sizes on both sides of the kernels' blocks.
SHAPES = [(), (1,), (7,), (64,), (0,), (65, 3), (4099,), (2, 3, 5), (128, 256), (257, 63), (96, 160), (96, 160)]
STEPS = 5
LR, WEIGHT_DECAY = 2e-2, 0.1
#: The rules that count their steps for some tensors.
COUNTING = ("factored", "averaged", "orthogonal")
#: What may differ, as a share of the movement, beside a rounding of the parameter in each step.
ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ALLOWED_OF_MOMENTUM = {torch.bfloat16: 1e-2, "8bit": 3e-2, "4bit": 3e-1}
#: Making a momentum orthogonal raises what is small in it, its errors, too.
ALLOWED_OF_ITS_ORTHOGONAL = {torch.bfloat16: 3e-2, "8bit": 1e-1, "4bit": 4e-1}
#: On a GPU Newton-Schulz is done in bfloat16.
ALLOWED_OF_NEWTON_SCHULZ = {"cuda": 1e-1, "cpu": 0.0}


class Tensors(nn.Module):
    """A model of nothing but parameters, every second matrix of which is transposed in memory.

    Args:
        device: Where they lie.
        dtype: Of the parameters.
        shapes: Of each.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(shapes):
            p = 0.1 * torch.randn(shape, generator=generator)  # so small that a rounding is little beside a step
            p = p.to(device, dtype)
            if len(shape) == 2 and index % 2:
                p = p.t().contiguous().t()
            self.register_parameter(f"weight{index}", nn.Parameter(p))

    def gradients(self, step: int) -> list[Tensor]:
        """Those of a step: a common part, and noise; the same on every device."""
        common, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + step)
        drawn = [
            torch.randn(p.shape, generator=common) + 0.5 * torch.randn(p.shape, generator=noise)
            for p in self.parameters()
        ]
        return [g.to(p.device, p.dtype) for g, p in zip(drawn, self.parameters(), strict=True)]

    def set_gradients(self, step: int) -> None:
        """Within the tensors that stand, as a captured graph wants it."""
        for p, g in zip(self.parameters(), self.gradients(step), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(g)


class Expected:
    """Where the reference brings an optimizer's parameters: in float64, every group by its own options.

    Args:
        optimizer: Made, and not stepped yet.
    """

    def __init__(self, optimizer: Any) -> None:
        full = [{**group, "params": [p for p in group["params"] if p.numel()]} for group in optimizer.param_groups]
        self._groups = [(group, _reference(group)) for group in full if group["params"]]
        self._start = [[p.detach().double().clone() for p in group["params"]] for group, _ in self._groups]
        self._steps = 0

    def step(self, lr: float | None = None) -> None:
        """From the gradients that the parameters have."""
        self._steps += 1
        for group, reference in self._groups:
            if lr is not None:
                reference.lr = lr
            reference.step([p.grad for p in group["params"]])

    def off(self) -> dict[str, float]:
        """How far the parameters are off over what is allowed: 1 is the most."""
        off, moved = [0.0], []
        for (group, reference), begun in zip(self._groups, self._start, strict=True):
            for p, target, start in zip(group["params"], reference.params, begun, strict=True):
                movement = (target - start).norm().item()
                rounding = self._steps * torch.finfo(p.dtype).eps * target.norm().item()
                difference = (p.detach().double() - target).norm().item()
                share = difference / (_allowed(p, group) * movement + rounding)
                moved.append(movement)
                off.append(share if math.isfinite(share) else math.inf)
        if min(moved) == 0:
            raise AssertionError("a parameter of the reference has not moved: this case would show nothing")
        return {"off": max(off)}


def _allowed(p: Tensor, group: dict[str, Any]) -> float:
    """What may differ, as a share of the movement."""
    orthogonal = group["update"] == "orthogonal"
    of_momentum = ALLOWED_OF_ITS_ORTHOGONAL if orthogonal else ALLOWED_OF_MOMENTUM
    of_rule = ALLOWED_OF_NEWTON_SCHULZ[p.device.type] if orthogonal else 0.0
    return max(ALLOWED[p.dtype], of_rule, of_momentum.get(group["momentum_dtype"], 0.0))


def _reference(group: dict[str, Any]) -> ReferenceSGDSaI:
    names = ("weight_decay", "momentum", "eps", "maximize", "update")
    return ReferenceSGDSaI(group["params"], lr=float(group["lr"]), **{name: group[name] for name in names})


def built(model: nn.Module, rule: str, lr: float | Tensor | None = None, **options: Any) -> SGDSaI:
    """SGD-SaI on all of a model's tensors, all of which decay; what has two dimensions is a matrix within layers."""
    lr = LR if lr is None else lr
    more: dict[str, Any] = {"no_decay": lambda name, p: False}
    if rule == "orthogonal":
        more["matrices"] = {f"^{name}$": p.ndim == 2 for name, p in model.named_parameters()}
    groups = groups_of(model, rule, lr, WEIGHT_DECAY, **more)
    options = {**needed(rule, next(model.parameters()).dtype), **options}
    return SGDSaI(groups, lr=lr, weight_decay=WEIGHT_DECAY, update=rule, **options)


def trained(
    device: Any, rule: str, dtype: torch.dtype, *, without: str = "", quiet: bool = False, **options: Any
) -> dict[str, Any]:
    """Some steps beside the reference.

    Args:
        device: The :class:`Device`.
        rule: The update rule.
        dtype: Of the parameters.
        without: Kernels that are left out.
        quiet: No step after the first may wait for the device.
        **options: Of the optimizer.
    """
    model = Tensors(device.torch, dtype)
    optimizer = built(model, rule, **options)
    expected = Expected(optimizer)
    with kernels(without) as used:
        for step in range(STEPS):
            model.set_gradients(step)
            expected.step()
            if quiet and step > 0:
                with device.nothing_waits():
                    optimizer.step()
            else:
                optimizer.step()
    return {**expected.off(), "kernels": sorted(used)}


def on_a_stream(device: Any, rule: str, **options: Any) -> dict[str, Any]:
    """Two models at a time, each step of either on a stream of its own."""
    models = [Tensors(device.torch), Tensors(device.torch)]
    optimizers = [built(model, rule, **options) for model in models]
    expected = [Expected(optimizer) for optimizer in optimizers]
    for step in range(STEPS):
        joins = []
        for index, model in enumerate(models):
            model.set_gradients(step + index)
            expected[index].step()
            device.wait()
        for optimizer in optimizers:
            with device.stream() as join:
                optimizer.step()
            joins.append(join)
        for join in joins:
            join()
    return {"off": max(one.off()["off"] for one in expected)}


def captured(device: Any, rule: str, **options: Any) -> dict[str, Any]:
    """A step that is captured as a CUDA graph, and replayed with other gradients."""
    model = Tensors(device.torch)
    optimizer = built(model, rule, **options)
    expected = Expected(optimizer)
    for step in range(3):
        model.set_gradients(step)
        expected.step()
        with device.stream() as join:  # as torch wants it before a capture
            optimizer.step()
        join()
    replay = device.captured(optimizer.step)
    for step in range(3, 3 + STEPS):
        model.set_gradients(step)
        expected.step()
        replay()
    return expected.off()


def refused_in_a_graph(device: Any, rule: str, **options: Any) -> dict[str, Any]:
    """A rule that counts its steps on the host must not be captured; there is nothing to refuse in a rehearsal."""
    if device.cuda:
        try:
            captured(device, rule, **options)
        except ValueError as refusal:
            if "counts its steps on the host" not in str(refusal):
                raise
        else:
            raise AssertionError("a captured graph would replay the first count of steps")
    return {"off": 0.0}


def compiled(device: Any, rule: str, backend: str, **options: Any) -> dict[str, Any]:
    """torch.compile of the whole step: the same numbers, and compiled once for all learning rates."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = Tensors(device.torch, shapes=[(64,), (65, 3), (128, 256)])
    optimizer = built(model, rule, torch.tensor(LR, device=device.torch), **options)
    expected = Expected(optimizer)
    counter = CompileCounterWithBackend(backend)
    step_compiled = torch.compile(lambda: optimizer.step(), backend=counter)
    counts = []
    for step in range(6):
        model.set_gradients(step)
        lr = LR * (1 + step / 4)
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        expected.step(lr)
        if step == 0:  # measures, which is not compiled
            optimizer.step()
        else:
            step_compiled()
            counts.append(counter.frame_count)
    if counts[-1] != counts[1]:
        raise AssertionError(f"the number of compiled frames grew with the learning rate: {counts}")
    return {**expected.off(), "compiled": counts[-1]}


def with_a_scaler(device: Any, rule: str, **options: Any) -> dict[str, Any]:
    """Gradients that GradScaler has scaled; a step with an infinite one is left out."""
    model = Tensors(device.torch)
    optimizer = built(model, rule, **options)
    expected = Expected(optimizer)
    scaler = torch.amp.GradScaler(device.torch.type, init_scale=1024.0)
    for step in range(STEPS):
        model.set_gradients(step)
        if step != 2:
            expected.step()
        gradients = model.gradients(step)
        if step == 2:
            gradients[-1][0, 0] = math.inf
        for p in model.parameters():
            p.grad = None
        loss = sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return expected.off()


def rounded(device: Any, **options: Any) -> dict[str, Any]:
    """Stochastic rounding: steps far below a bfloat16's resolution move it as far on average as they should."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(512, 512, device=device.torch, dtype=torch.bfloat16))
    model.weight.grad = torch.ones_like(model.weight)
    lr, steps = 1e-4 / model.weight.numel() ** 0.5, 20
    groups = groups_of(model, "published", lr, 0.0)
    optimizer = SGDSaI(groups, lr=lr, weight_decay=0.0, stochastic_rounding=True, **options)
    generator = torch.Generator().manual_seed(0)
    sign = (torch.randint(0, 2, model.weight.shape, generator=generator) * 2 - 1).to(model.weight)
    model.weight.grad.mul_(sign)  # without a mean, so that g-SNR is about sqrt(n)
    for _ in range(steps):
        optimizer.step()
    (scale,) = (row.gsnr for row in optimizer.gsnr_report())
    moved = ((1 - model.weight.detach().double()) * sign.double()).mean().item()
    return {"off": abs(moved / (steps * lr * scale) - 1) / 0.05}


def released(device: Any, rule: str) -> dict[str, Any]:
    """Updates within the backward pass are those of a step after it."""
    models = [Tensors(device.torch), Tensors(device.torch)]
    optimizers = [built(models[0], rule), built(models[1], rule, gradient_release=True)]
    expected = Expected(optimizers[1])
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients = model.gradients(step)
            sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True)).backward()
            if optimizer is optimizers[0]:
                for p, twin in zip(model.parameters(), models[1].parameters(), strict=True):
                    twin.grad = p.grad
                expected.step()
                for twin in models[1].parameters():
                    twin.grad = None
            optimizer.step()
            optimizer.zero_grad()
    return expected.off()


def beyond_32_bits(device: Any, elements: int, **options: Any) -> dict[str, Any]:
    """A tensor whose elements 32 bits do not count is updated to its end."""
    p, g, m = (torch.full((elements,), value, device=device.torch, dtype=torch.bfloat16) for value in (1.0, 0.5, 0.25))
    small = [t[:64].clone() for t in (p, g, m)]
    step = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.5, **options}
    sgd_sai([p], [g], [m], [1.0], **step)
    sgd_sai(*([t] for t in small), [1.0], **step)
    places = [0, elements // 2, elements - 64]
    same = all(torch.equal(p[at : at + 64], small[0]) and torch.equal(m[at : at + 64], small[2]) for at in places)
    return {"off": 0.0 if same and small[0][0] != 1 else math.inf}


def cases(part: Part) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of each, those first that any user meets; compiling, which takes longest, last."""
    device = part.device
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if not part.rehearse:
        dtypes["float16"] = torch.float16
    for path, (options, without) in PATHS.items():
        for rule in RULES:
            for kind, dtype in dtypes.items():
                yield (
                    f"{rule}, {path}, {kind}",
                    lambda a=(rule, dtype), b=options, c=without: trained(device, *a, without=c, **b),
                )
    for rule in RULES:
        for path in ("default", "fused"):
            options = PATHS[path][0]
            yield (
                f"{rule}, {path}, no step waits",
                lambda a=rule, b=options: trained(device, a, torch.float32, quiet=True, **b),
            )
            yield f"{rule}, {path}, two streams", lambda a=rule, b=options: on_a_stream(device, a, **b)
            yield f"{rule}, {path}, GradScaler", lambda a=rule, b=options: with_a_scaler(device, a, **b)
        yield f"{rule}, gradient release", lambda a=rule: released(device, a)
    for momentum_dtype in (torch.bfloat16, "8bit", "4bit"):
        name = str(momentum_dtype).removeprefix("torch.")
        for rule in ("published", "factored", "orthogonal"):
            for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                yield (
                    f"{rule}, {name} momentum, {kind}",
                    lambda a=(rule, dtype), b=momentum_dtype: trained(device, *a, momentum_dtype=b, quiet=True),
                )
    for path in ("default", "fused"):
        options = PATHS[path][0]
        yield f"stochastic rounding, {path}", lambda b=options: rounded(device, **b)
        elements = 4096 if part.rehearse else 2**31 + 4096
        yield f"more than 2^31 elements, {path}", lambda b=options, n=elements: beyond_32_bits(device, n, **b)
    yield "stochastic rounding, 8bit momentum", lambda: rounded(device, momentum_dtype="8bit")
    for rule in RULES:  # late, since a capture that fails can leave the device in disorder
        for path in ("default", "fused"):
            options = PATHS[path][0]
            capture = refused_in_a_graph if rule in COUNTING else captured
            yield f"{rule}, {path}, graph capture", lambda a=rule, b=options, c=capture: c(device, a, **b)
    for rule in RULES:
        if rule == "averaged":  # counts on the host, so that torch.compile leaves its steps as they are
            continue
        backend = "eager" if part.rehearse else "inductor"
        yield f"{rule}, torch.compile of the step", lambda a=rule, b=backend: compiled(device, a, b)


def judged(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What came of a case: passed, failed or, where something is not installed, not run."""
    try:
        found = work()
    except ImportError as error:
        return {"outcome": "not run", "reason": str(error)}
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {lines[0][:300] if lines else ''}"}
    return {"outcome": "passed" if found["off"] <= 1 else "failed", **found}


def main() -> None:
    with Part("correctness", __doc__) as part:
        part.results["cases"] = []
        for name, work in cases(part):
            found = {"case": name, **judged(work)}
            part.results["cases"].append(found)
            part.save()
            if found["outcome"] != "passed":
                print(f"{name}: {found}", flush=True)
        part.device.free()
        outcomes = [case["outcome"] for case in part.results["cases"]]
        print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})


if __name__ == "__main__":
    main()

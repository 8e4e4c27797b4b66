"""The SGD-SaI optimizer: SGD with momentum and learning-rate scales measured once, at initialisation.

Reference: "No More Adam: Learning Rate Scaling at Initialization is All You Need", Xu, Xiang, Cai, Wen,
arXiv 2412.11768. The authors' code is the PyPI package ``sgd-sai``; where this module departs from it or from the
paper, the docstring of :class:`SGDSaI` says so.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_sai.distributed.fsdp1 import FlatSlices, is_slice, refuse_flat_parameter
from hf_sai.distributed.sharding import draw_alike, full_shapes, in_many_processes, local_shard
from hf_sai.kernels.compiled import wants_compiled
from hf_sai.optim.checks import check_options, check_params, with_float_gsnr
from hf_sai.optim.gradient_norm import MEAN_SQUARES, NORMALIZED, allocate_mean_squares, gradient_factors
from hf_sai.optim.gradient_release import refuse_normalize, release_gradients
from hf_sai.optim.gsnr import UNMEASURED, GSNRReport, GSNRRow, measure_gsnr
from hf_sai.optim.momentum import QUANTIZED, allocate_momentum, convert_momentum, momentum_of, set_momentum
from hf_sai.optim.update import can_fuse, sgd_sai

if TYPE_CHECKING:
    from hf_sai.distributed.zero import Zero

__all__ = ["SGDSaI"]

logger = logging.getLogger(__name__)

#: After this many steps, parameters that still have no g-SNR are named in one warning.
WARN_UNMEASURED_AFTER = 20

# Options that the official code does not have, with the defaults that mean what it does.
_LATER_OPTIONS = {
    "normalize": False,
    "normalize_gradient": None,
    "maximize": False,
    "momentum_dtype": None,
    "stochastic_rounding": False,
    "foreach": None,
    "fused": None,
}


class SGDSaI(Optimizer):
    r"""SGD with momentum whose step size per tensor is scaled by its initial g-SNR (arXiv 2412.11768, Algorithm 1).

    For each parameter tensor :math:`\theta` with gradient :math:`g_t`:

    .. math::
        G &= \|g_1\|_2 / (\sigma(g_1) + \epsilon) && \text{once, at the first usable gradient}\\
        m_1 &= g_1, \qquad m_t = \mu m_{t-1} + (1 - \mu) g_t\\
        \theta_t &= (1 - \gamma\lambda)\, \theta_{t-1} - \gamma\, G\, m_t

    with learning rate :math:`\gamma`, momentum :math:`\mu` and decoupled weight decay :math:`\lambda`. For a gradient
    without a mean, :math:`G \approx \sqrt{n}` whatever the gradient's size. SGD-SaI wants a learning rate
    about 10 times AdamW's or more: start at 1e-2.

    State per parameter: ``gsnr``, a Python float (so that no dtype cast touches it), 0.0 while unmeasured; and
    ``momentum_buffer``, a tensor of the parameter's shape and dtype, absent where ``momentum`` is 0. AdamW keeps
    two such tensors. The state dict of the official ``SGD_sai`` loads.

    Departures from the official code, each where that fails:

    - g-SNR is measured per parameter at its first gradient that is finite and not all zero. Until then the parameter
      is left as it is: no update, no decay. (Officially: at step 1; a zero gradient, as of LoRA's A, freezes the
      parameter for ever, a missing one is a KeyError, inf or NaN stays.)
    - ``eps`` adds at most 0.5 % to the standard deviation, so that small gradients measure like large ones.
    - One element has g-SNR 1 (officially about ``|g| / eps``), and no g-SNR exceeds ``10 * sqrt(n)``.
    - A g-SNR is never measured again: not after resume, copying, pickling or a change of dtype.

    Parameters may be whole, sharded (DTensor: FSDP2, HSDP, tensor parallelism), slices (FSDP1) or flattened (DeepSpeed
    ZeRO): the g-SNR is always that of the whole tensor. The step that measures runs one all_reduce per process group,
    later ones none; momentum is sharded like its parameter.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or dicts that define groups. Give names
            (``model.named_parameters()``) and warnings and reports use them. Group keys beside the options below:
            ``name`` labels the group in reports; ``normalize_over`` (any hashable) joins groups for ``normalize``.
        lr: Learning rate, a finite number or one-element tensor >= 0.
        momentum: Coefficient in [0, 1). With 0 no buffer is kept.
        weight_decay: Decoupled decay per unit of learning rate, >= 0. It is not scaled by g-SNR.
        eps: Added to the standard deviation, at most 0.5 % of it, in units of the gradient, >= 0.
        normalize: Divide every g-SNR by the largest (the paper's Algorithm 1, line 14; the official code
            does not). The largest is taken over all parameters of this optimizer, or over the groups that share a
            ``normalize_over``. Since the largest is about ``sqrt(n)`` of the largest tensor, the same training needs
            a learning rate higher by that factor: thousands for a language model. A larger g-SNR that is measured
            later lowers the scale of all others from then on.
        normalize_gradient: Divide each gradient, after measuring, by root-mean-squares, so that the update is
            :math:`\gamma\, (G / \sqrt{n})\, m` with :math:`m` the momentum of these gradients: about :math:`\gamma` in
            most elements, so that learning rates are those of AdamW and not of SGD-SaI. ``"rows"``: every row (first
            dimension) by its own, as SCALE does (arXiv 2506.16659), vectors as a whole. ``"tensor"``: each gradient by
            the whole's. ``"factored"``: each element by a running one that is estimated from its row's and its
            column's, as Adafactor does (arXiv 1804.04235), which keeps one float32 more per row and column (per
            element of a vector) and comes close to AdamW. ``p.grad`` may be changed in place. Clipping, which comes
            before, has no effect any more on ``"rows"`` and ``"tensor"``. Not together with ``normalize``; refused
            under FSDP1 and DeepSpeed ZeRO. None, the published algorithm, by default.
        maximize: Ascend instead of descend.
        momentum_dtype: What the momentum is kept in: None for the parameter's dtype, another float dtype such as
            ``torch.bfloat16``, or ``"8bit"`` or ``"4bit"`` for bitsandbytes' blocks of 256 or 128 elements with a
            float32 scale each (extra ``quant``; tensors below 4096 elements stay as they are). 4, 2, 1.02 or 0.53
            bytes per element. The update is computed in float32 then: on CPU in one pass over memory for float32
            parameters (extra ``speed``), on CUDA in bitsandbytes' kernel for ``"8bit"``, else one tensor at a time.
        stochastic_rounding: Round bfloat16 parameters up or down at random, for training without float32 copies of
            them. Draws from torch's random number generator; with several processes the same numbers on all, so that
            replicas stay equal.
        foreach: Use torch's multi-tensor operations, which need temporary memory of the size of the parameters.
        fused: Update in one pass over memory and without temporary memory, decay included, with numba's kernel on CPU
            (extra ``speed``; float32 and float64) and Triton's on CUDA; without them with torch's fused SGD kernel,
            in two passes. What no kernel takes, such as a parameter with transposed memory, is
            updated by itself. If ``foreach`` and ``fused`` are both None, so are CPU parameters (with numba from 2^24
            elements on, 2^17 in the average tensor), and CUDA's take ``foreach``. ``foreach=False`` is the plain loop.
        gradient_release: Update each parameter within ``backward()`` and free its gradient at once; ``step()`` then
            only counts. Excludes gradient accumulation, clipping by the global norm (there is nothing left to clip),
            GradScaler, ``normalize`` and more than one process.

    Raises:
        ValueError: An option is out of range, a parameter is complex or a flat parameter of FSDP1, or ``foreach`` and
            ``fused`` are both True.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.gsnr_report().unmeasured)
        0
    """

    _engine: Zero | FlatSlices | None
    _engine_is_known: bool

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        *,
        normalize: bool = False,
        normalize_gradient: str | None = None,
        maximize: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        gradient_release: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "normalize": normalize,
            "normalize_gradient": normalize_gradient,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "fused": fused,
        }
        check_options(defaults)
        if gradient_release is not True and gradient_release is not False:
            raise ValueError(f"gradient_release must be True or False, but is {gradient_release!r}.")
        self._steps = 0
        self._gradient_release = gradient_release
        self._released: set[Tensor] = set()  # since the last step()
        super().__init__(params, defaults)
        self._reset_engine()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_steps", 0)
        self.__dict__.setdefault("_gradient_release", False)
        self.__dict__.setdefault("_released", set())
        self._reset_engine()
        for group in self.param_groups:  # groups saved by the official code, or by an older version of this one
            for key, default in _LATER_OPTIONS.items():
                group.setdefault(key, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters are measured at their own first usable gradients.

        Args:
            param_group: ``params`` and any options that differ from the optimizer's.

        Raises:
            ValueError: An option is out of range or a parameter is complex; the optimizer is left as it was.
        """
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_params(self.param_groups[-1])
            if self._gradient_release:
                refuse_normalize(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if self._gradient_release:
            release_gradients(self, len(self.param_groups) - 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the official ``SGD_sai``; what was measured stays measured.

        Args:
            state_dict: What ``state_dict()`` returned. The official code's g-SNR tensors become floats before torch
                could cast them to the parameters' dtype; its 0 or NaN (never measured rightly) is measured anew. As
            always in torch, the options saved with the groups replace the optimizer's own.
        """
        state = {key: with_float_gsnr(value) for key, value in state_dict["state"].items()}
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            mine = [{key: group[key] for key in _LATER_OPTIONS} for group in self.param_groups]
            groups = [{**options, **group} for options, group in zip(mine, groups, strict=True)]
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self._restore_dtypes([index for group in groups for index in group["params"]], state)

    def _restore_dtypes(self, indices: list[Any], saved: dict[Any, Any]) -> None:
        """Put everything back whose dtype torch has changed in loading to its parameter's."""
        params = [(p, group["momentum_dtype"]) for group in self.param_groups for p in group["params"]]
        for index, (p, momentum_dtype) in zip(indices, params, strict=True):
            for key in saved.get(index, {}).keys() & MEAN_SQUARES:
                self.state[p][key] = saved[index][key].to(p.device, copy=True)
            momentum = {key: value for key, value in saved.get(index, {}).items() if key.startswith("momentum_")}
            if momentum and (momentum_dtype is not None or momentum["momentum_buffer"].dtype != p.dtype):
                for key in momentum:
                    del self.state[p][key]
                self.state[p].update(convert_momentum(momentum, p, momentum_dtype))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling to the fused kernel."""
        if self._gradient_release:
            raise ValueError("gradient_release updates with gradients that GradScaler has not unscaled; use bfloat16.")
        if any(is_slice(p) for p in self._params()) or self._find_engine() is not None:
            return False  # the scaler must unscale by itself, and agree with the other ranks on infinities
        return all(
            group["fused"]
            and group["normalize_gradient"] is None
            and group["momentum_dtype"] is None
            and not group["stochastic_rounding"]
            and all(map(can_fuse, group["params"]))
            for group in self.param_groups
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Recomputes the loss with gradients and returns it; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: A gradient is sparse, or the parameters are flattened in a way that cannot be measured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps += 1
        self._released.clear()
        if not self._engine_is_known:
            self._engine, self._engine_is_known = self._find_engine(), True
            self._check_engine()
        if self._engine is not None and not isinstance(self._engine, FlatSlices):
            self._engine.step(self)
        else:
            self._step_parameters()
        if self._steps == WARN_UNMEASURED_AFTER:
            self._warn_unmeasured()
        return loss

    def _step_parameters(self) -> None:
        """The step, unless DeepSpeed has flattened the parameters."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        pending = self._pending(self.param_groups)
        if pending and grad_scale is not None:
            # Measuring looks at the gradients anyway, so unscale them here; the momentum starts from true gradients.
            if found_inf is not None and found_inf.item():
                return
            torch._foreach_div_([p.grad for p in self._params() if p.grad is not None], grad_scale)
            grad_scale = found_inf = None
        self._measure(pending)
        if isinstance(self._engine, FlatSlices):
            self._engine.measure(self.param_groups, self.state)
        factors = self._gradient_factors(self.param_groups, pending)

        largest = self._largest_gsnr()
        for group in self.param_groups:
            self._update(group, largest, factors, grad_scale, found_inf)

    @torch.no_grad()
    def update_released(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter by itself, for ``gradient_release``; its gradient may be freed afterwards.

        Raises:
            ValueError: It has been updated since the last ``step()``: gradients are being accumulated.
        """
        if p in self._released:
            raise ValueError(
                "gradient_release: a parameter was given a second gradient before optimizer.step(). Gradients cannot "
                "be accumulated (gradient_accumulation_steps=1), nor come in parts (use_reentrant=False in "
                "gradient checkpointing), since the first has been applied and freed."
            )
        self._released.add(p)
        alone = {**group, "params": [p]}
        pending = self._pending([alone])
        self._measure(pending)
        factors = self._gradient_factors([alone], pending)
        self._update(alone, {}, factors, None, None)

    def gsnr_report(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> GSNRReport:
        """The g-SNR of every non-empty parameter, and who is still unmeasured.

        Args:
            named_parameters: ``model.named_parameters()``, for an optimizer that was built without names.

        Returns:
            A report to iterate, query (``report.unmeasured``) or show (``str(report)``).
        """
        names = {} if named_parameters is None else {id(p): name for name, p in named_parameters}
        engine = self._engine or self._find_engine()
        if engine is not None and not isinstance(engine, FlatSlices):
            return GSNRReport(tuple(engine.rows(self, names)))
        rows = []
        for number, group in enumerate(self.param_groups):
            for index, (p, shape) in enumerate(zip(group["params"], full_shapes(group["params"]), strict=True)):
                if shape.numel() == 0:
                    continue
                known = group["param_names"][index] if "param_names" in group else f"group {number} parameter {index}"
                gsnr = self._gsnr(p)
                rows.append(
                    GSNRRow(
                        name=names.get(id(p), known),
                        group=str(group.get("name", number)),
                        shape=tuple(shape),
                        gsnr=gsnr if gsnr != UNMEASURED else None,
                        ratio=gsnr / math.sqrt(shape.numel()) if gsnr != UNMEASURED else None,
                    )
                )
        return GSNRReport(tuple(rows))

    def _reset_engine(self) -> None:
        """Look again at the next step for what keeps the parameters in pieces."""
        self._engine = None
        self._engine_is_known = False
        self._all_groups = self.param_groups  # DeepSpeed shows one group at a time

    def _find_engine(self) -> Zero | FlatSlices | None:
        """What keeps the parameters in pieces that do not say whose they are: DeepSpeed ZeRO, FSDP1 or nothing."""
        if self._engine_is_known:
            return self._engine
        params = list(self._params())
        for p in params:
            refuse_flat_parameter(p)
        if any(map(is_slice, params)):
            return FlatSlices(params)
        if "deepspeed.runtime.base_optimizer" in sys.modules:
            from hf_sai.distributed.zero import find_zero

            return find_zero(self)
        return None

    def _check_engine(self) -> None:
        """Refuse what is not done for parameters in pieces, before the first update."""
        if self._engine is None:
            return
        for group in self._all_groups:
            for option in ("momentum_dtype", "stochastic_rounding", "normalize_gradient"):
                if group[option]:
                    cure = "use torch.bfloat16 with FSDP2" if group[option] in QUANTIZED else "use FSDP2"
                    raise ValueError(
                        f"{option}={group[option]!r} does not work under FSDP1 and DeepSpeed ZeRO, which hand the "
                        f"optimizer pieces of parameters. Leave it out, or {cure} (fsdp_version: 2)."
                    )

    def _gsnr(self, p: Tensor) -> float:
        """A parameter's g-SNR, also where this rank has no part of it."""
        stored = self.state[p].get("gsnr", UNMEASURED) if p in self.state else UNMEASURED
        return self._engine.gsnr.get(p, stored) if isinstance(self._engine, FlatSlices) else stored

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _pending(self, groups: list[dict[str, Any]]) -> list[tuple[Tensor, dict[str, Any]]]:
        """The unmeasured parameters that have a gradient, each with its group."""
        return [
            (p, group)
            for group in groups
            for p in group["params"]
            if p.grad is not None
            and p.numel() > 0
            and self.state[p].get("gsnr", UNMEASURED) == UNMEASURED
            and not is_slice(p)
        ]

    def _measure(self, pending: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Measure the pending parameters and start their momentum at the gradient.

        Those that cannot be measured yet get their state's keys all the same: torch.distributed.checkpoint
        builds its loading template from a step on zero gradients.
        """
        gradients = [cast(Tensor, p.grad) for p, _ in pending]
        for gradient in gradients:
            if gradient.is_sparse:
                raise ValueError(
                    "SGD-SaI does not support sparse gradients, and a parameter of shape "
                    f"{tuple(gradient.shape)} has one. Build its torch.nn.Embedding with sparse=False."
                )
        eps = [group["eps"] for _, group in pending]
        for (p, group), gsnr in zip(pending, measure_gsnr(gradients, eps=eps), strict=True):
            state = self.state[p]
            state["gsnr"] = gsnr
            allocate_mean_squares(state, p, group["normalize_gradient"])
            if group["momentum"] != 0:
                allocate_momentum(state, p, group["momentum_dtype"])
                if gsnr != UNMEASURED and not group["normalize_gradient"]:
                    self._start_momentum(p, group)

    def _start_momentum(self, p: Tensor, group: dict[str, Any]) -> None:
        """At the gradient, which must be normalised if it is to be."""
        gradient = cast(Tensor, p.grad)
        allocate_momentum(self.state[p], p, group["momentum_dtype"])
        set_momentum(self.state[p], p, -gradient if group["maximize"] else gradient)

    def _gradient_factors(
        self, groups: list[dict[str, Any]], pending: list[tuple[Tensor, dict[str, Any]]]
    ) -> dict[Tensor, tuple[Tensor, ...]]:
        """What ``normalize_gradient`` multiplies gradients by; where the momentum starts at them it is done here."""
        result: dict[Tensor, tuple[Tensor, ...]] = {}
        measured_now = {p for p, _ in pending}
        for how in NORMALIZED:
            chosen = [group for group in groups if group["normalize_gradient"] == how]
            owners = {p: group for group in chosen for p in group["params"] if self._gsnr(p) != UNMEASURED}
            for p in owners:  # measured before the option was switched on
                allocate_mean_squares(self.state[p], p, how)
            compiled = any(wants_compiled(group["params"], group["foreach"], group["fused"]) for group in chosen)
            result |= gradient_factors(owners, how, self.state, compiled=compiled)
            for p, group in owners.items():
                starts = p in measured_now or "momentum_buffer" not in self.state[p]
                if p in result and starts and group["momentum"] != 0:
                    for factor in result.pop(p):
                        local_shard(cast(Tensor, p.grad)).mul_(factor)
                    self._start_momentum(p, group)
        return result

    def _largest_gsnr(self) -> dict[Any, float]:
        """The largest measured g-SNR of each ``normalize_over`` (None: all groups without one)."""
        largest: dict[Any, float] = {}
        for group in self.param_groups:
            if group["normalize"]:
                measured = map(self._gsnr, group["params"])
                key = group.get("normalize_over")
                largest[key] = max(largest.get(key, UNMEASURED), max(measured, default=UNMEASURED))
        return largest

    def _update(
        self,
        group: dict[str, Any],
        largest: dict[Any, float],
        grad_factors: dict[Tensor, tuple[Tensor, ...]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update the measured parameters of one group that have a gradient: of sharded ones the local shards."""
        params, grads, buffers, scales, factors = [], [], [], [], []
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            state = self.state[p]
            if state["gsnr"] == UNMEASURED:
                continue
            if group["momentum"] != 0 and "momentum_buffer" not in state:  # momentum was 0 until now
                self._start_momentum(p, group)
            params.append(local_shard(p))
            grads.append(local_shard(p.grad, like=p))
            buffers.append(momentum_of(state, p) if group["momentum"] != 0 else None)
            unit = largest[group.get("normalize_over")] if group["normalize"] else 1.0
            factors.append(grad_factors.get(p, ()))
            scales.append(state["gsnr"] / (math.sqrt(p.numel()) if group["normalize_gradient"] else unit))
        options = {
            key: group[key]
            for key in ("lr", "momentum", "weight_decay", "maximize", "stochastic_rounding", "foreach", "fused")
        }
        options |= {"grad_scale": grad_scale, "found_inf": found_inf}
        if not (group["stochastic_rounding"] and in_many_processes()):
            sgd_sai(params, grads, buffers, scales, grad_factors=factors, **options)
            return
        # One by one: of a sharded parameter ranks may draw fewer numbers, and replicas must be rounded alike.
        each = zip(params, grads, buffers, scales, factors, strict=True)
        for number, (p, g, m, scale, own_factors) in enumerate(each):
            with draw_alike((self._steps << 20) + number, p.device):
                sgd_sai([p], [g], [m], [scale], grad_factors=[own_factors], **options)

    def _warn_unmeasured(self) -> None:
        unmeasured = self.gsnr_report().unmeasured
        if unmeasured:
            names = ", ".join(row.name for row in unmeasured[:10]) + (", ..." if len(unmeasured) > 10 else "")
            logger.warning(
                "After %d steps %d parameters have had no finite, non-zero gradient and are not being trained: %s. "
                "This is right for parameters that the data has not reached yet (experts, unseen tokens); otherwise "
                "freeze them (requires_grad=False) or check that the loss depends on them.",
                self._steps,
                len(unmeasured),
                names,
            )

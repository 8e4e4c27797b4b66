"""The SGD-SaI optimizer: SGD with momentum and learning-rate scales measured once, at initialisation.

Reference: "No More Adam: Learning Rate Scaling at Initialization is All You Need", Xu, Xiang, Cai, Wen,
arXiv 2412.11768. The authors' code is the PyPI package ``sgd-sai``; where this module departs from it or from the
paper, the docstring of :class:`SGDSaI` says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_sai.functional import can_fuse, sgd_sai
from hf_sai.gsnr import UNMEASURED, GSNRReport, GSNRRow, measure_gsnr

__all__ = ["SGDSaI"]

logger = logging.getLogger(__name__)

#: After this many steps, parameters that still have no g-SNR are named in one warning.
WARN_UNMEASURED_AFTER = 20


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
        maximize: Ascend instead of descend.
        foreach: Use torch's multi-tensor operations, which need temporary memory of the size of the parameters.
            None chooses them on CUDA.
        fused: Use torch's fused SGD kernel, without temporary memory, for contiguous parameters on CUDA and for
            float32 and float64 ones on CPU; others are updated one by one.

    Raises:
        ValueError: An option is out of range, a parameter is complex, or ``foreach`` and ``fused`` are both True.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.gsnr_report().unmeasured)
        0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        *,
        normalize: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "normalize": normalize,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        _check_options(defaults)
        self._steps = 0
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_steps", 0)
        for group in self.param_groups:  # groups saved by the official code, or by an older version of this one
            for key, default in (("normalize", False), ("maximize", False), ("foreach", None), ("fused", None)):
                group.setdefault(key, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters are measured at their own first usable gradients.

        Args:
            param_group: ``params`` and any options that differ from the optimizer's.

        Raises:
            ValueError: An option is out of range or a parameter is complex; the optimizer is left as it was.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            _check_params(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the official ``SGD_sai``; what was measured stays measured.

        Args:
            state_dict: What ``state_dict()`` returned. The official code's g-SNR tensors become floats before torch
                could cast them to the parameters' dtype; its 0 or NaN (never measured rightly) is measured anew.
        """
        state = {key: _with_float_gsnr(value) for key, value in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling to the fused kernel."""
        return all(group["fused"] and all(map(can_fuse, group["params"])) for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Recomputes the loss with gradients and returns it; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps += 1

        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        pending = self._pending()
        if pending and grad_scale is not None:
            # Measuring looks at the gradients anyway, so unscale them here; the momentum starts from true gradients.
            if found_inf is not None and found_inf.item():
                return loss
            torch._foreach_div_([p.grad for p in self._params() if p.grad is not None], grad_scale)
            grad_scale = found_inf = None
        self._measure(pending)

        largest = self._largest_gsnr()
        for group in self.param_groups:
            self._update(group, largest, grad_scale, found_inf)
        if self._steps == WARN_UNMEASURED_AFTER:
            self._warn_unmeasured()
        return loss

    def gsnr_report(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> GSNRReport:
        """The g-SNR of every non-empty parameter, and who is still unmeasured.

        Args:
            named_parameters: ``model.named_parameters()``, for an optimizer that was built without names.

        Returns:
            A report to iterate, query (``report.unmeasured``) or show (``str(report)``).
        """
        names = {} if named_parameters is None else {id(p): name for name, p in named_parameters}
        rows = []
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.numel() == 0:
                    continue
                known = group["param_names"][index] if "param_names" in group else f"group {number} parameter {index}"
                gsnr = self.state[p].get("gsnr", UNMEASURED) if p in self.state else UNMEASURED
                rows.append(
                    GSNRRow(
                        name=names.get(id(p), known),
                        group=str(group.get("name", number)),
                        shape=tuple(p.shape),
                        gsnr=gsnr if gsnr != UNMEASURED else None,
                        ratio=gsnr / math.sqrt(p.numel()) if gsnr != UNMEASURED else None,
                    )
                )
        return GSNRReport(tuple(rows))

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _pending(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The unmeasured parameters that have a gradient, each with its group."""
        return [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p.numel() > 0 and self.state[p].get("gsnr", UNMEASURED) == UNMEASURED
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
        for (p, group), gradient, gsnr in zip(pending, gradients, measure_gsnr(gradients, eps=eps), strict=True):
            state = self.state[p]
            state["gsnr"] = gsnr
            if group["momentum"] != 0:
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                if gsnr != UNMEASURED:
                    buffer.copy_(-gradient if group["maximize"] else gradient)

    def _largest_gsnr(self) -> dict[Any, float]:
        """The largest measured g-SNR of each ``normalize_over`` (None: all groups without one)."""
        largest: dict[Any, float] = {}
        for group in self.param_groups:
            if group["normalize"]:
                measured = (self.state[p]["gsnr"] for p in group["params"] if "gsnr" in self.state.get(p, {}))
                key = group.get("normalize_over")
                largest[key] = max(largest.get(key, UNMEASURED), max(measured, default=UNMEASURED))
        return largest

    def _update(
        self, group: dict[str, Any], largest: dict[Any, float], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Update the measured parameters of one group that have a gradient."""
        params, grads, buffers, scales = [], [], [], []
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            state = self.state[p]
            if state["gsnr"] == UNMEASURED:
                continue
            if group["momentum"] != 0 and "momentum_buffer" not in state:  # momentum was 0 until now
                state["momentum_buffer"] = torch.zeros_like(p).copy_(-p.grad if group["maximize"] else p.grad)
            params.append(p)
            grads.append(p.grad)
            buffers.append(state["momentum_buffer"] if group["momentum"] != 0 else None)
            scales.append(state["gsnr"] / (largest[group.get("normalize_over")] if group["normalize"] else 1.0))
        sgd_sai(
            params,
            grads,
            buffers,
            scales,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

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


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an option out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, but has shape {tuple(lr.shape)}.")
    limits = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "eps": math.inf}
    for name, limit in limits.items():
        value = options[name]
        if name == "lr" and isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < limit:
            allowed = "a finite number >= 0" if limit == math.inf else f"a number in [0, {limit:g})"
            raise ValueError(f"{name} must be {allowed}, but is {options[name]!r}.")
    for name in ("normalize", "maximize", "foreach", "fused"):
        allowed_values = (True, False) if name in ("normalize", "maximize") else (True, False, None)
        if not any(options[name] is value for value in allowed_values):
            raise ValueError(f"{name} must be one of {allowed_values}, but is {options[name]!r}.")
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused are both True; choose one, or leave both at None.")


def _check_params(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot be trained."""
    for index, p in enumerate(group["params"]):
        name = group["param_names"][index] if "param_names" in group else f"number {index}"
        if p.is_complex():
            raise ValueError(
                f"Parameter {name} is complex ({p.dtype}), which SGD-SaI does not support. "
                "Make its real view the parameter: torch.nn.Parameter(torch.view_as_real(p.detach()))."
            )


def _with_float_gsnr(state: Any) -> Any:
    """A parameter's saved state with its g-SNR as a float."""
    if not isinstance(state, dict) or "gsnr" not in state:
        return state
    gsnr = float(state["gsnr"])
    return {**state, "gsnr": gsnr if math.isfinite(gsnr) else UNMEASURED}

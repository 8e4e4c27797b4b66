"""The SGD-SaI optimizer: SGD with momentum and learning-rate scales measured once, at initialisation.

Reference: "No More Adam: Learning Rate Scaling at Initialization is All You Need", Xu, Xiang, Cai, Wen,
arXiv 2412.11768. The authors' code is the PyPI package ``sgd-sai``; where this module departs from it or from the
paper, the docstring of :class:`SGDSaI` says so.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_sai.optim import gsnr
from hf_sai.optim import momentum as momenta
from hf_sai.optim.gradient_release import Releases, refuse_normalize
from hf_sai.optim.gsnr import GSNRReport
from hf_sai.optim.layout import UNMEASURED, Layout, Part, admit, find_layout, kind_of, name_of, whole_shapes
from hf_sai.optim.options import DEFAULTS, OPTIONS, check_options, upgrade_group
from hf_sai.optim.rules import RULES
from hf_sai.optim.rules.averaged import WEIGHT_SUM, show_means
from hf_sai.optim.rules.orthogonal import form_of
from hf_sai.optim.saved_state import Incoming, completed, read
from hf_sai.optim.stochastic import draw_alike, in_many_processes
from hf_sai.optim.update import Choice, can_unscale, multiplied, sgd_sai

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
    2.5 to 50 times AdamW's, and on all weights of a pretrained language model less than that: start at 1e-2, there at
    1e-5.

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

    docs/options.md says more of each option, docs/low_bits.md, docs/speed.md and docs/memory.md what it costs.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or dicts that define groups; named ones are named in reports.
            A group may have a ``name`` of its own, and ``normalize_over``, which joins groups for ``normalize``.
        lr: Learning rate, a finite number or one-element tensor >= 0.
        momentum: Coefficient in [0, 1). With 0 no buffer is kept.
        weight_decay: Decoupled decay per unit of learning rate, >= 0. It is not scaled by g-SNR.
        eps: Added to the standard deviation, at most 0.5 % of it, in units of the gradient, >= 0.
        update: The rule: ``"published"``, the paper's; ``"rows"`` and ``"factored"``, with gradients of unit size;
            ``"averaged"``, which also averages the weights; or ``"orthogonal"``, as Muon moves hidden matrices.
        nesterov: Step along the momentum a step ahead, :math:`\mu m_t + (1 - \mu) g_t` (as torch's SGD does, whose
            momentum is a sum). Hidden matrices under ``"orthogonal"`` always do; ``"averaged"`` cannot.
        normalize: Divide every g-SNR by the largest of this optimizer, or of the groups that share a
            ``normalize_over`` (the paper's Algorithm 1, line 14; the official code does not).
        maximize: Ascend instead of descend.
        momentum_dtype: What the momentum is kept in: None for the parameter's dtype, another float dtype, or
            ``"8bit"`` or ``"4bit"`` for blocks in bitsandbytes' form (faster with extra ``quant``).
        stochastic_rounding: Round bfloat16 parameters up or down at random, to train without float32 copies of them;
            alike on all replicas.
        foreach: Use torch's multi-tensor operations, which need temporary memory of the size of the parameters; False
            is the plain loop.
        fused: Update in one pass over memory, decay included: numba's kernel on CPU (extra ``speed``), Triton's on
            CUDA (never run on a GPU yet, so only if asked), else torch's in two passes (without ``nesterov``). If
            ``foreach`` and ``fused`` are both None, so are CPU parameters.
        gradient_release: Update each parameter within ``backward()`` and free its gradient at once. Excludes
            accumulation, clipping by the global norm, GradScaler, ``normalize`` and more than one process.

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

    #: All groups, also while an engine shows the optimizer only one of them.
    all_groups: list[dict[str, Any]]

    #: The parameters of each group and their shapes as the optimizer was given them, to see if they are exchanged.
    built_with: list[list[tuple[weakref.ref[Tensor], torch.Size]]]

    #: id of each group -> its rule, its momentum and whether that looks ahead, to see if somebody changes them.
    _rules: dict[int, tuple[str, str | None, float, bool]]

    _layout: Layout | None
    _releases: Releases | None
    _incoming: Incoming | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULTS["lr"],
        momentum: float = DEFAULTS["momentum"],
        weight_decay: float = DEFAULTS["weight_decay"],
        eps: float = DEFAULTS["eps"],
        *,
        update: str = DEFAULTS["update"],
        nesterov: bool = DEFAULTS["nesterov"],
        normalize: bool = DEFAULTS["normalize"],
        maximize: bool = DEFAULTS["maximize"],
        momentum_dtype: torch.dtype | str | None = DEFAULTS["momentum_dtype"],
        stochastic_rounding: bool = DEFAULTS["stochastic_rounding"],
        foreach: bool | None = DEFAULTS["foreach"],
        fused: bool | None = DEFAULTS["fused"],
        gradient_release: bool = DEFAULTS["gradient_release"],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "update": update,
            "nesterov": nesterov,
            "normalize": normalize,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "fused": fused,
        }
        check_options(defaults)
        OPTIONS["gradient_release"].check(gradient_release)
        self._begin()
        self._gradient_release = gradient_release
        if gradient_release:
            self._releases = Releases(self)
        super().__init__(params, defaults)
        self.all_groups = self.param_groups

    def _begin(self) -> None:
        """What no state dict holds."""
        self._steps = 0
        self._layout = self._releases = self._incoming = None
        self.all_groups, self.built_with, self._rules = [], [], {}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_steps": self._steps, "_gradient_release": self._gradient_release}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # unpickled or copied, not loading a state dict
            self._begin()
        super().__setstate__(state)
        self.param_groups = self.all_groups = [upgrade_group(group) for group in self.param_groups]
        if "defaults" in state:
            self.defaults = upgrade_group(self.defaults)
            self.__dict__.setdefault("_gradient_release", False)
            self.built_with = [_identities(group) for group in self.param_groups]
            if self._gradient_release:
                self._releases = Releases(self)
                for index in range(len(self.param_groups)):
                    self._releases.watch(index)
        self._layout = None
        self._rules = {id(group): _rule_of(group) for group in self.param_groups}
        for p, _, tensors in self._incoming or ():
            self.state[p].update(tensors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters are measured at their own first usable gradients.

        Args:
            param_group: ``params`` and any options that differ from the optimizer's.

        Raises:
            ValueError: An option is out of range or a parameter is complex; the optimizer is left as it was.
        """
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_params(group)
            RULES[group["update"]].check(group, whole_shapes(group["params"]))
            if self._releases is not None:
                refuse_normalize(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self.built_with.append(_identities(group))
        self._rules[id(group)] = _rule_of(group)
        self._layout = None
        if self._releases is not None:
            self._releases.watch(len(self.param_groups) - 1)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch saves it; of sharded parameters a momentum of 8 or 4 bits as float32 values.

        These can be sharded anew, and take 4 bytes an element of the shard for as long as the dict lives.
        """
        state_dict = super().state_dict()
        state = state_dict["state"]
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                kind = kind_of(p)
                if index not in state and self.state and p.requires_grad and whole_shapes([p])[0].numel() == 0:
                    state[index] = {"gsnr": UNMEASURED}  # torch.distributed.checkpoint wants a state of each parameter
                if not kind.parted and index in state:
                    state[index] = completed(p, state[index])
                begins = kind.always_saved and index not in state and p.requires_grad and p.numel() > 0
                if kind.parted and (index in state or begins):
                    part = kind.at_rest(p, group, state.get(index, {}))
                    if begins:
                        _allocate(part)
                    state[index] = momenta.saved(part)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the official ``SGD_sai``; what was measured stays measured.

        As always in torch, the options saved with the groups replace the optimizer's own; a warning names those that
        differ. Where saved and present parameters have the same names in another order, the state goes by the names.

        Args:
            state_dict: What ``state_dict()`` returned. The official code's g-SNR tensors become floats before torch
                could cast them to the parameters' dtype; its 0 or NaN (never measured rightly) is measured anew.

        Raises:
            ValueError: The state was written by another optimizer, or for other parameters; nothing is loaded then.
        """

        def part(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            loaded, self._incoming = read(loaded, self.param_groups, flat=not self.layout.whole)
            return loaded

        hook = self.register_load_state_dict_pre_hook(part)  # the last one: it sees what all others have made
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._incoming = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters; with ``gradient_release``, after an interrupted backward pass, too."""
        if self._releases is not None:
            self._releases.clear()
        super().zero_grad(set_to_none)

    def train(self) -> None:
        """With ``update="averaged"`` make the parameters those that are trained; else nothing. Trainer calls it."""
        self._show_means(False)

    def eval(self) -> None:
        """With ``update="averaged"`` make the parameters their means, to evaluate and save; else nothing.

        Trainer calls it before it evaluates; a loop of your own must, and :meth:`train` before it goes on.
        """
        self._show_means(True)

    @torch.no_grad()
    def _show_means(self, shown: bool) -> None:
        self._take_up_rules()
        for group in self.param_groups:
            if RULES[group["update"]].averages and group.get("means_shown", False) != shown:
                for p in group["params"]:
                    if p in self.state:
                        show_means(kind_of(p).at_rest(p, group, self.state[p]), shown)
                group["means_shown"] = shown

    def _take_up_rules(self) -> None:
        """Where a group's rule has been changed, check the new one and forget what the old one kept."""
        for group in self.all_groups:
            if id(group) not in self._rules:
                self._rules[id(group)] = _rule_of(group)
            before, form, momentum, nesterov = self._rules[id(group)]
            if (group["update"], form_of(group)) == (before, form):
                if (group["momentum"], group["nesterov"]) != (momentum, nesterov):
                    self._take_up_momentum(group, momentum)
                continue
            check_options(group)
            old, new = RULES[before], RULES[group["update"]]
            new.check(group, whole_shapes(group["params"]))
            for p in group["params"]:
                if p in self.state:
                    old.leave(kind_of(p).at_rest(p, group, self.state[p]), new)
            group.pop("means_shown", None)  # training goes on from what is shown
            self._rules[id(group)] = _rule_of(group)
            self._layout = None

    def _take_up_momentum(self, group: dict[str, Any], before: float) -> None:
        """Weights that are trained near their mean lie where the momentum says; from the mean itself it can change."""
        if group["nesterov"]:
            check_options(group)
        averages = RULES[group["update"]].averages and not group.get("means_shown", False)
        moved = group["momentum"] != before
        if moved and averages and any(WEIGHT_SUM in self.state[p] for p in group["params"] if p in self.state):
            now = group["momentum"]
            group["momentum"] = before
            raise ValueError(
                f"update='averaged' trains weights whose place its momentum decides, and that went from {before} to "
                f"{now}: switch that off (OneCycleLR and CyclicLR: cycle_momentum=False), or call optimizer.eval(), "
                "change it and call optimizer.train()."
            )
        self._rules[id(group)] = _rule_of(group)

    def _refuse_means(self) -> None:
        if any(group.get("means_shown") for group in self.param_groups):
            raise ValueError(
                "The weights are the means of update='averaged'; call optimizer.train() before training on."
            )

    @property
    def layout(self) -> Layout:
        """How the parameters lie in this process, found anew when groups or states have changed."""
        if self._layout is None:
            self._layout = find_layout(self)
        return self._layout

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling to the fused kernel."""
        if self._releases is not None:
            raise ValueError("gradient_release updates with gradients that GradScaler has not unscaled; use bfloat16.")
        if not self.layout.whole:
            return False  # the scaler must unscale by itself, and agree with the other ranks on infinities
        return all(
            group["fused"]
            and group["update"] == "published"
            and group["momentum_dtype"] is None
            and not group["stochastic_rounding"]
            and all(can_unscale(p, _choice(group)) for p in group["params"])
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
        if self._releases is not None:
            self._releases.clear()
        self._take_up_rules()
        self._refuse_means()
        parts = self.layout.parts()
        gsnr.refuse_sparse(parts)  # before anything changes, gradients and counts too
        for group in self.param_groups:
            if group["stochastic_rounding"]:  # of all processes alike, however many and whatever they hold of the group
                group["rounding_step"] = group.get("rounding_step", 0) + 1
        new = self.layout.unmeasured(parts)
        of_scaler = {key: getattr(self, key) for key in ("grad_scale", "found_inf") if hasattr(self, key)}
        # Measuring looks at the gradients anyway, so they are unscaled for it; the momentum starts from true gradients.
        if not (new and of_scaler):
            self._advance(parts, new, of_scaler)
        elif self._unscale(parts, **of_scaler):
            self._advance(parts, new, {})
        if not torch.compiler.is_compiling():  # torch 2.11 cannot trace the count
            self._steps += 1
            if self._steps == WARN_UNMEASURED_AFTER:
                self._warn_unmeasured()
        return loss

    def _advance(self, parts: Sequence[Part], new: Sequence[Part], of_scaler: dict[str, Tensor | None]) -> None:
        """Algorithm 1 for these parts: measure the new ones, then gradient, momentum and parameter by their rules."""
        # --- g-SNR, once: G = ||g|| / sigma(g)
        gsnr.measure(new)
        for part in new:
            if part.grad is not None:
                _allocate(part)
        # --- the rule's gradient
        by_rule: dict[str, list[Part]] = {name: [] for name in RULES}
        for part in self.layout.together(parts):
            if part.gsnr != UNMEASURED:
                by_rule[part.group["update"]].append(part)
        factors: dict[int, Sequence[Tensor]] = {}
        for name, own in by_rule.items():
            factors |= zip([part.number for part in own], RULES[name].factors(own), strict=True)
        # --- m = g at first
        by_group: dict[int, list[Part]] = defaultdict(list)
        for part in parts:
            if part.number in factors:
                by_group[id(part.group)].append(part)
        for of in by_group.values():
            if of[0].group["momentum"] == 0:
                for part in of:
                    momenta.drop(part)
                continue
            for part in of:
                if part.fresh or "momentum_buffer" not in part.state:
                    part.grad = multiplied(part.grad, factors[part.number])
                    factors[part.number] = ()
                    RULES[part.group["update"]].start(part)
        # --- m = mu m + (1 - mu) g, theta = (1 - lr wd) theta - lr G m
        largest = self._largest_gsnr()
        for of in by_group.values():
            self._update(of, factors, largest, of_scaler)

    def _update(
        self,
        parts: Sequence[Part],
        factors: dict[int, Sequence[Tensor]],
        largest: dict[Any, float],
        of_scaler: dict[str, Tensor | None],
    ) -> None:
        """Update parts of one group, with the factors of their gradients by the parts' numbers."""
        group = parts[0].group
        rule = RULES[group["update"]]
        unit = largest[group.get("normalize_over")] if group["normalize"] else 1.0
        names = ("lr", "nesterov", "weight_decay", "maximize", "stochastic_rounding", "foreach", "fused")
        options: dict[str, Any] = {**{name: group[name] for name in names}, **of_scaler}
        alike = group["stochastic_rounding"] and in_many_processes()
        whole = {"lr": 1.0, "weight_decay": 0.0, "maximize": False}
        for portion in rule.portions(parts, factors):
            of_portion = {**options, **(whole if portion.whole else {}), "momentum": portion.momentum}
            lists = (
                [part.param for part in portion.parts],
                portion.gradients,
                portion.momenta,
                [1.0 if portion.whole else rule.scale(part.gsnr, part.shape.numel()) / unit for part in portion.parts],
                portion.factors or [()] * len(portion.parts),
            )
            if not alike:
                sgd_sai(*lists[:4], grad_factors=lists[4], **of_portion)
                continue
            # One by one: of a sharded parameter ranks may draw fewer numbers, and replicas must be rounded alike.
            for part, *one, own in zip(portion.parts, *lists, strict=True):
                with draw_alike(part.param.device, part.gsnr, part.number, group["rounding_step"], part.place):
                    sgd_sai(*([value] for value in one), grad_factors=[own], **of_portion)

    def _unscale(self, parts: Sequence[Part], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Undo GradScaler's scale; False if an infinity was found and the step is to be skipped."""
        if found_inf is not None and found_inf.item():
            return False
        if grad_scale is not None:
            for part in parts:
                part.grad.div_(grad_scale.to(part.grad.device))
        return True

    @torch.no_grad()
    def update_released(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter by itself, for ``gradient_release``; its gradient may be freed afterwards."""
        self._take_up_rules()
        self._refuse_means()
        part = self.layout.part(p, group)
        gsnr.refuse_sparse([part])
        self._advance([part], self.layout.unmeasured([part]), {})

    def gsnr_report(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> GSNRReport:
        """The g-SNR of every non-empty parameter, and who is still unmeasured.

        Args:
            named_parameters: ``model.named_parameters()``, for an optimizer that was built without names.

        Returns:
            A report to iterate, query (``report.unmeasured``) or show (``str(report)``).
        """
        return gsnr.report(self.layout, {id(p): name for name, p in named_parameters or ()})

    def _largest_gsnr(self) -> dict[Any, float]:
        """The largest measured g-SNR of each ``normalize_over`` (None: all groups without one)."""
        largest: dict[Any, float] = defaultdict(float)
        if any(group["normalize"] for group in self.param_groups):
            for *_, value, group in self.layout.measured():
                if group["normalize"]:
                    key = group.get("normalize_over")
                    largest[key] = max(largest[key], value)
        return largest

    def _warn_unmeasured(self) -> None:
        trained = [(p, row) for row, p in gsnr.rows(self.layout) if p.requires_grad]
        still = [row.name for _, row in trained if not row.measured]
        if not still:
            return
        if len(still) == len(trained) and any(p.grad is not None and not p.grad.isfinite().all() for p, _ in trained):
            logger.warning(
                "After %d steps nothing is being trained: all gradients have been zero, infinite or NaN, as of a loss "
                "that is not finite. Look at the loss of the first step.",
                self._steps,
            )
            return
        logger.warning(
            "After %d steps %d parameters have had no finite, non-zero gradient and are not being trained: %s. "
            "This is right for parameters that the data has not reached yet (experts, unseen tokens); otherwise "
            "freeze them (requires_grad=False) or check that the loss depends on them.",
            self._steps,
            len(still),
            ", ".join(still[:10]) + (", ..." if len(still) > 10 else ""),
        )


def _allocate(part: Part) -> None:
    """Give a parameter's state its keys, measured or not.

    torch.distributed.checkpoint builds its loading template from a step on zero gradients.
    """
    part.state.setdefault("gsnr", part.gsnr)
    RULES[part.group["update"]].allocate(part)
    if part.group["momentum"] != 0:
        momenta.allocate(part)


def _choice(group: dict[str, Any]) -> Choice:
    return Choice(group["foreach"], group["fused"], group["stochastic_rounding"], group["nesterov"])


def _identities(group: dict[str, Any]) -> list[tuple[weakref.ref[Tensor], torch.Size]]:
    return [(weakref.ref(p), p.shape) for p in group["params"]]


def _rule_of(group: dict[str, Any]) -> tuple[str, str | None, float, bool]:
    """A group's rule, form, momentum and nesterov. One that averages says from the first on in the group what it shows.

    A key that came later would be lost: torch.distributed.checkpoint loads those that a new optimizer has.
    """
    if RULES[group["update"]].averages:
        group.setdefault("means_shown", False)
    return str(group["update"]), form_of(group), group["momentum"], group["nesterov"]


def _check_params(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot be trained, and for names that reports could not use."""
    names, many = group.get("param_names", ()), len(group["params"])
    are_texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if "param_names" in group and not (are_texts and len(names) == many):
        raise ValueError(
            f"param_names is {str(names)[:80]}; it must be a list of texts, one for each parameter ({many})."
        )
    for index, p in enumerate(group["params"]):
        admit(p)
        if p.is_complex():
            raise ValueError(
                f"Parameter {name_of(group, index) or f'number {index}'} is complex ({p.dtype}), which SGD-SaI does "
                "not support. Make its real view the parameter: torch.nn.Parameter(torch.view_as_real(p.detach()))."
            )

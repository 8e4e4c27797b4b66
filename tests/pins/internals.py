"""The only place of the pins that spells what a redesign may rename: the rule's option, and three internals."""

import contextlib
from unittest import mock

from hf_sai.kernels import choice
from hf_sai.optim.momentum import load, momentum_of


def rule_options(rule):
    """The option of ``SGDSaI`` for a rule: ``"published"``, ``"rows"`` or ``"factored"``."""
    return {"update": rule}


@contextlib.contextmanager
def without_numba():
    """Within, ``fused=True`` is torch's own fused kernel."""
    with mock.patch.object(choice, "_imported", return_value=None):
        yield


def momentum(optimizer, p):
    """A parameter's momentum as numbers, dequantised if it is quantised; None where there is none."""
    (group,) = [group for group in optimizer.param_groups if any(p is other for other in group["params"])]
    part = optimizer.layout.part(p, group)
    return load(momentum_of(part)) if "momentum_buffer" in part.state else None


def momentum_tensors(optimizer, p):
    """What a parameter's momentum is stored in, bit by bit."""
    return [value for key, value in sorted(optimizer.state[p].items()) if key.startswith("momentum_")]

"""The only place of the pins that spells what a redesign may rename: the rule's option, and three internals."""

import contextlib
from unittest import mock

from hf_sai import compiled
from hf_sai.momentum import QuantizedMomentum, momentum_of


def rule_options(rule):
    """The option of ``SGDSaI`` for a rule: ``"published"``, ``"rows"`` or ``"factored"``."""
    return {"normalize_gradient": None if rule == "published" else rule}


@contextlib.contextmanager
def without_numba():
    """Within, ``fused=True`` is torch's own fused kernel."""
    with mock.patch.object(compiled, "_imported", return_value=None):
        yield


def momentum(optimizer, p):
    """A parameter's momentum as numbers, dequantised if it is quantised; None where there is none."""
    state = optimizer.state[p]
    if "momentum_buffer" not in state:
        return None
    kept = momentum_of(state, p)
    return kept.load() if isinstance(kept, QuantizedMomentum) else kept


def momentum_tensors(optimizer, p):
    """What a parameter's momentum is stored in, bit by bit."""
    return [value for key, value in sorted(optimizer.state[p].items()) if key.startswith("momentum_")]

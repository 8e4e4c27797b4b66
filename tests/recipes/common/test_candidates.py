"""What recipes compare: optimizers that step in training mode only are timed, too."""

from schedulefree import AdamWScheduleFree
from torch import nn

from recipes.common.candidates import Candidate, adamw, timing_table


def test_schedule_free_optimizers_are_timed_in_training_mode():
    candidates = {
        "adamw": Candidate(adamw(), (1e-3,)),
        "schedule-free": Candidate(lambda model, lr: AdamWScheduleFree(model.parameters(), lr=lr), (1e-3,)),
    }
    assert "| schedule-free |" in timing_table(lambda: nn.Linear(2, 2), list(candidates), candidates)

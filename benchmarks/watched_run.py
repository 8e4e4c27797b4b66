"""Looks at SGD-SaI in the steps of any Trainer script, and ends the script after enough of them."""

from collections.abc import Callable

import torch

from hf_sai import SGDSaI
from hf_sai.run import run_target

__all__ = ["watch_steps"]


class FinishedError(SystemExit):
    """Ends the script."""


def watch_steps(
    script: str, arguments: list[str], steps: int, register: Callable, look: Callable[[SGDSaI], None]
) -> None:
    """Run a script and call ``look(optimizer)`` in each of its first steps with SGD-SaI.

    Args:
        script: Its path.
        arguments: The script's own.
        steps: After so many it ends.
        register: ``torch.optim.optimizer.register_optimizer_step_pre_hook`` or ``..._post_hook``: before the step or
            after it.
        look: Gets the optimizer, its gradients in place.

    Raises:
        SystemExit: The script took fewer steps.
    """
    seen = 0

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal seen
        if isinstance(optimizer, SGDSaI):
            look(optimizer)
            seen += 1
            if seen == steps:
                raise FinishedError(0)

    registered = register(hook)
    try:
        run_target(script, arguments, is_module=False)
    except FinishedError:
        return
    finally:
        registered.remove()
    raise SystemExit(f"{script} took {seen} steps with SGD-SaI, fewer than --steps {steps}.")

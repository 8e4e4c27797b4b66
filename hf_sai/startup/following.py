"""What a process under ``python -m hf_sai.run`` does besides its work: it notes whose steps it takes, leaves a record.

The environment says what was asked for. This imports nothing, since other processes run it at their start, some of
which have no use for torch.
"""

import functools
import os
import sys

__all__ = ["NOTES", "RECORD", "note_steps", "record_every_trainer", "stepped"]

#: Folder in which every process notes the classes of the optimizers that took a step in it.
NOTES = "HF_SAI_RUN_NOTES"
#: Set where every Trainer is to leave a record.
RECORD = "HF_SAI_RUN_RECORD"

#: How our optimizer is called in the notes, subclasses included.
OURS = "SGDSaI"

# Their wrappers are optimizers as well; what they wrap takes the step.
_WRAPPERS = ("accelerate", "deepspeed")


def stepped():
    """Returns the names of the optimizer classes that took a step, here or in a process that was started from here."""
    try:
        return {name.partition("-")[0] for name in os.listdir(os.environ[NOTES])}
    except (KeyError, OSError):
        return set()


def note_steps(optimizer_module):
    """Notes each class of optimizer at its first step, in a file: workers may end without a word.

    Args:
        optimizer_module: ``torch.optim.optimizer``.
    """
    noted = set()

    def note(optimizer, *_):
        kind = type(optimizer)
        if kind in noted or kind.__module__.partition(".")[0] in _WRAPPERS:
            return
        noted.add(kind)
        ours = any(base.__name__ == OURS and base.__module__.startswith("hf_sai.") for base in kind.__mro__)
        try:
            open(os.path.join(os.environ[NOTES], f"{OURS if ours else kind.__name__}-{os.getpid()}"), "w").close()
        except (KeyError, OSError):  # no folder: no line at the end
            return
        if ours:
            _say_how_many_train()

    optimizer_module.register_optimizer_step_post_hook(note)


def _say_how_many_train():
    """One line at the first step, where a launcher that started one process instead of two would be silent."""
    distributed = sys.modules.get("torch.distributed")
    count = 1
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if distributed.get_rank() != 0:
            return
        count = distributed.get_world_size()
    sys.stderr.write(f"hf_sai.run: {count} process{'es train' if count > 1 else ' trains'} with SGD-SaI.\n")


def record_every_trainer(trainer_module):
    """Gives every Trainer a ``RunRecordCallback`` that has none.

    Args:
        trainer_module: ``transformers.trainer``.
    """
    original = trainer_module.Trainer.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):  # noqa: N807
        from hf_sai.trainer.callbacks import RunRecordCallback

        original(self, *args, **kwargs)
        if not any(isinstance(callback, RunRecordCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RunRecordCallback())

    trainer_module.Trainer.__init__ = __init__

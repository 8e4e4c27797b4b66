"""Finds the twins of a run: finished runs beside it of the same training with another optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sai.runs.record import RECORD_FILE, RunRecord

__all__ = ["MAX_TWINS", "find_twins"]

#: As many as a picture holds beside the run itself.
MAX_TWINS = 5
#: Settings that belong to the optimizer, or that say where a run is kept and shown.
_MAY_DIFFER = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "lr"),
    *("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint", "push_to_hub"),
    *("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push"),
)
_SAME_MODEL = ("class", "base_class", "base_model", "parameters", "trainable", "adapter")


def find_twins(directory: str | Path) -> list[Path]:
    """Look among the folders beside a run's for its twins.

    A twin is finished, was trained as many steps on the same data with the same settings, and differs in the
    optimizer and its options. Of several with the same optimizer the one with the smallest loss is taken.

    Args:
        directory: The run's directory.

    Returns:
        Their directories, at most 5, in the order of their names.

    Raises:
        ValueError: The run's own record cannot be read. Others that cannot be read are no twins.
    """
    directory = Path(directory).resolve()
    own = RunRecord.load(directory)
    best: dict[str, tuple[float, Path]] = {}
    for file in sorted(directory.parent.glob(f"*/{RECORD_FILE}")):
        if file.parent == directory:
            continue
        try:
            other = RunRecord.load(file)
        except ValueError:
            continue
        if not _are_twins(own, other):
            continue
        name, loss = str(other.optimizer.get("name")), other.metrics().get("loss", float("inf"))
        if name not in best or loss < best[name][0]:
            best[name] = (loss, file.parent)
    return sorted(path for _, path in best.values())[:MAX_TWINS]


def _are_twins(own: RunRecord, other: RunRecord) -> bool:
    return (
        other.run.get("status") == "finished"
        and own.optimizer.get("name") != other.optimizer.get("name")
        and own.run.get("steps") == other.run.get("steps")
        and own.data == other.data
        and _training(own) == _training(other)
    )


def _training(record: RunRecord) -> list[dict[str, Any]]:
    settings = {key: value for key, value in record.settings.items() if key not in _MAY_DIFFER}
    model = {key: record.model.get(key) for key in _SAME_MODEL}
    adapter = model["adapter"]
    if isinstance(adapter, dict) and isinstance(adapter.get("target_modules"), list):
        model["adapter"] = {**adapter, "target_modules": sorted(map(str, adapter["target_modules"]))}  # PEFT has a set
    return [settings, model]

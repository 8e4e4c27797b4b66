"""Says what others would miss in a run that is about to be published: its card, its tokenizer, its base model."""

from __future__ import annotations

from pathlib import Path

from hf_sai.publishing.card_merge import MAX_CARD_BYTES, words_of_a_person
from hf_sai.publishing.cards import CARD_FILE, base_model
from hf_sai.publishing.files_to_publish import PublishPlan, is_tokenizer
from hf_sai.runs.files import read_text
from hf_sai.runs.record import RECORD_FILE, RunRecord

__all__ = ["shortcomings"]


def shortcomings(run_dir: str | Path, plan: PublishPlan) -> list[str]:
    """What is missing for others to load the model and to know what it is.

    Args:
        run_dir: The run's directory.
        plan: What of it would be uploaded.

    Returns:
        A sentence for each, with what to do; none where all is there, or where there is no record to tell by.

    Raises:
        ValueError: The record or the card cannot be read.
    """
    root, names = Path(run_dir), [name for name, _ in plan.files]
    if RECORD_FILE not in names:
        return []
    record, path = RunRecord.load(root), root / CARD_FILE
    card = read_text(path, MAX_CARD_BYTES) if CARD_FILE in names else ""
    found = []
    if "<!-- hf-sai:" not in card and not (card and words_of_a_person(path)):
        found.append(f"the card says nothing of this run: `hf-sai card {root}` writes it")
    if "AutoTokenizer.from_pretrained" in card and not any(map(is_tokenizer, names)):
        found.append(f"the card's code loads a tokenizer, and there is none: tokenizer.save_pretrained({str(root)!r})")
    if record.model.get("adapter") and base_model(record) is None:
        found.append("the base model lies only on this machine, so that nobody else can load this adapter of it")
    return found

"""What the model writes for held-out prompts, scored against the completions of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate", "references", "score", "side_by_side"]

METRICS = Path(__file__).parents[1] / "metrics"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_new_tokens: int,
    batch_size: int,
    desc: str,
) -> list[str]:
    """Complete the rows' prompts greedily.

    Args:
        model: The model, with or without an adapter.
        tokenizer: Its tokenizer.
        rows: Rows with a `prompt`, a text or a list of messages.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts at once.
        desc: What the progress bar says.

    Returns:
        The completions, without special tokens and outer white space, in the order of the rows.
    """
    prompts = [_prompt_text(row["prompt"], tokenizer) for row in rows]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    texts = []
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc=desc, unit="batch"):
            batch = tokenizer(
                prompts[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            with torch.no_grad():
                output = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return [text.strip() for text in texts]


def score(predictions: Sequence[str], references: Sequence[str], docstrings: bool) -> dict[str, float]:
    """Return ROUGE-L and, for docstrings, the share of well-formed ones, both between 0 and 1."""
    # Everything is scored in this process: no lock files, no waiting for the others.
    scores = _metric("rouge_l").compute(predictions=predictions, references=references)
    if docstrings:
        scores |= _metric("docstring_form").compute(predictions=predictions)
    return scores


def side_by_side(rows: Dataset, before: Sequence[str], after: Sequence[str]) -> str:
    """Return prompts with what the data has and what was written before and after training, as Markdown.

    Args:
        rows: The rows; as many are shown as there are texts in `before`.
        before: What was written before training.
        after: And after it.
    """
    parts = []
    for row, old, new in zip(rows, before, after, strict=False):
        texts = {"prompt": _last(row["prompt"]), "data": _last(row["completion"]), "before": old, "after": new}
        parts.append("\n\n".join(f"**{title}**\n\n````\n{text}\n````" for title, text in texts.items()))
    return "\n\n---\n\n".join(parts) + "\n"


def references(rows: Dataset) -> list[str]:
    """Return the rows' completions as plain text."""
    return [_last(row["completion"]) for row in rows]


def _metric(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(METRICS / name / f"{name}.py"))


def _last(text: str | list[dict]) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _prompt_text(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return (tokenizer.bos_token or "") + prompt if _adds_bos(tokenizer) else prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts a text with its bos token, as it did for the rows that were trained on."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

"""Prompts and completions: the standard library's code and docstrings, or any data set with a known format."""

from __future__ import annotations

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from recipes.common.recipe_input import InputError, first_line
from recipes.common.stdlib_corpus import load_docstring_pairs

__all__ = ["as_prompt_and_completion", "docstring_dataset", "load_splits", "shorten"]

INSTRUCTION = "Write the docstring."


def docstring_dataset() -> DatasetDict:
    """Return the standard library's (code, docstring) pairs as chats; see `recipes.common.stdlib_corpus` for the split.

    Columns: `prompt`, a system message and the code as the user's message, and `completion`, the docstring in its
    quotes as the assistant's. Docstrings that need escapes to be written down are left out.
    """

    def chat(row: dict) -> dict:
        return {
            "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["code"]}],
            "completion": [{"role": "assistant", "content": f'"""{row["docstring"]}"""'}],
        }

    def plain(row: dict) -> bool:
        return "\\" not in row["docstring"] and '"""' not in row["docstring"] and not row["docstring"].endswith('"')

    pairs = load_docstring_pairs().filter(plain, desc="leaving out docstrings with escapes")
    return pairs.map(chat, remove_columns=pairs["train"].column_names, desc="writing prompts and completions")


def load_splits(name: str | None, config: str | None, train_split: str, test_split: str, held_out: int) -> DatasetDict:
    """Return the splits `train` and `validation` with the columns `prompt` and `completion`.

    Args:
        name: Data set on the hub or local folder or file (.json, .jsonl, .csv, .parquet); None: `docstring_dataset`.
        config: Its configuration, if it has several.
        train_split: Name of the split to train on.
        test_split: Name of the split to evaluate on; if there is none, rows of the training split are held out.
        held_out: How many rows then.

    Raises:
        InputError: The data set cannot be loaded, has no such split or no known format.
    """
    if name is None:
        return docstring_dataset()
    suffix = name.rpartition(".")[2].lower()
    try:
        if suffix in ("json", "jsonl", "csv", "parquet"):
            splits = load_dataset("json" if suffix == "jsonl" else suffix, data_files={train_split: name})
        else:
            splits = load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {name}: {first_line(error)}") from error
    if train_split not in splits:
        raise InputError(f"{name} has no split {train_split!r}; it has {', '.join(splits)} (--dataset_train_split).")
    train = as_prompt_and_completion(splits[train_split], name)
    if test_split in splits:
        return DatasetDict(train=train, validation=as_prompt_and_completion(splits[test_split], name))
    if len(train) <= held_out:
        raise InputError(f"{name} has {len(train)} rows, too few to hold out {held_out} of them (--held_out_rows).")
    parts = train.train_test_split(test_size=held_out, seed=0)
    return DatasetDict(train=parts["train"], validation=parts["test"])


def as_prompt_and_completion(rows: Dataset, name: str) -> Dataset:
    """Bring rows with `prompt` and `completion`, or with a chat in `messages`, into the former shape.

    Of a chat the last message is the completion; it must be the assistant's.

    Raises:
        InputError: The columns are others, there are no rows, or a chat does not end with the assistant.
    """
    if len(rows) == 0:
        raise InputError(f"{name} has no rows.")
    if {"prompt", "completion"} <= set(rows.column_names):
        return rows.select_columns(["prompt", "completion"])
    column = next((column for column in ("messages", "conversations") if column in rows.column_names), None)
    if column is None:
        raise InputError(
            f"{name} has the columns {', '.join(rows.column_names)}; needed are prompt and completion, or messages."
        )

    def split(row: dict) -> dict:
        messages = [
            {"role": _ROLES.get(m.get("role") or m.get("from")), "content": m.get("content") or m.get("value")}
            for m in row[column]
        ]
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    rows = rows.map(split, remove_columns=rows.column_names, desc="splitting chats into prompt and completion")
    kept = rows.filter(_is_answered, desc="leaving out chats that do not end with the assistant")
    if len(kept) == 0:
        raise InputError(f"{name}: no chat in the column {column} ends with a message of the assistant after another.")
    return kept


def shorten(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, limit: int | None) -> Dataset:
    """Keep rows of at most `max_length` tokens, and of these `limit`, chosen with a fixed seed.

    Cutting a completion off would teach the model not to finish.

    Raises:
        InputError: No row is short enough.
    """
    if max_length is not None:

        def fits(row: dict) -> bool:
            return len(_token_ids(row, tokenizer)) <= max_length

        kept = rows.filter(fits, desc=f"keeping rows of at most {max_length} tokens")
        if len(kept) == 0:
            raise InputError(f"none of the {len(rows)} rows has at most {max_length} tokens; raise --max_length.")
        rows = kept
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(limit))
    return rows


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _is_answered(row: dict) -> bool:
    return bool(row["prompt"]) and row["completion"][0]["role"] == "assistant" and bool(row["completion"][0]["content"])


def _token_ids(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(row["prompt"], str):
        return [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
    return tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]

"""Real text where there is no network: the sources of the installed packages, as tokens of a BPE made from them.

    python -m benchmarks.gpu.text

Python files and pages of text of the standard library and of all installed packages, each content once. A file belongs
to the validation text by the checksum of its content. Files come in the order of that checksum, so that a limit takes a
sample of all packages. The tokens are kept in the system's folder for temporary files, for who asks for the same next.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["FULL", "TINY", "Settings", "Tokens", "tokens"]

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
#: Larger files are tables of data.
LARGEST_FILE = 400_000
END = "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """How much text, and its tokens.

    Attributes:
        vocabulary: Number of tokens, at most 65,536.
        bytes: Of text that is read at most.
        bytes_for_bpe: Of these, what the BPE is made from.
        validation_share: Of the files.
        folders: Where it is searched for.
    """

    vocabulary: int
    bytes: int
    bytes_for_bpe: int
    validation_share: float
    folders: tuple[str, ...]


_PATHS = sysconfig.get_paths()
FULL = Settings(
    vocabulary=50257,
    bytes=120_000_000,
    bytes_for_bpe=25_000_000,
    validation_share=0.02,
    folders=tuple(dict.fromkeys(_PATHS[name] for name in ("stdlib", "purelib", "platlib"))),
)
TINY = Settings(
    vocabulary=320,
    bytes=300_000,
    bytes_for_bpe=50_000,
    validation_share=0.3,
    folders=(f"{_PATHS['stdlib']}/email", f"{_PATHS['stdlib']}/asyncio"),
)


@dataclass(frozen=True)
class Tokens:
    """Tokens of the two texts, and what they were made from.

    Attributes:
        train: uint16, whose numbers torch keeps as int32.
        validation: The same.
        facts: Files, bytes, tokens and vocabulary.
    """

    train: Tensor
    validation: Tensor
    facts: dict[str, int]


def tokens(settings: Settings) -> Tokens:
    """Read them from where they are kept, or make them first.

    Args:
        settings: How much, and from where.

    Raises:
        ValueError: The machine holds too little text.
    """
    key = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"hf_sai_tokens_{os.getuid()}_{key}.npz"
    if not kept.is_file():
        _make(kept, settings)
    with np.load(kept) as found:
        train, validation = (torch.from_numpy(found[name].astype(np.int32)) for name in ("train", "validation"))
        return Tokens(train, validation, json.loads(str(found["facts"])))


def _make(kept: Path, settings: Settings) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts: dict[str, list[str]] = {"train": [], "validation": []}
    read = 0
    for digest, text in _texts(settings.folders, settings.bytes):
        share = int.from_bytes(digest[-4:], "big") / 2**32
        texts["validation" if share < settings.validation_share else "train"].append(text)
        read += len(text)
    if not texts["validation"] or read < settings.bytes_for_bpe:
        raise ValueError(f"the packages of this Python hold {read:,} characters of text, too few to train on.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts["train"], settings.bytes_for_bpe), trainer)
    end = tokenizer.token_to_id(END)
    arrays = {}
    for name, of in texts.items():
        encoded = tokenizer.encode_batch_fast(of, add_special_tokens=False)
        arrays[name] = np.concatenate([np.asarray([*one.ids, end], dtype=np.uint16) for one in encoded])
    facts = {
        "files": sum(map(len, texts.values())),
        "characters": read,
        "train_tokens": len(arrays["train"]),
        "validation_tokens": len(arrays["validation"]),
        "vocabulary": tokenizer.get_vocab_size(),
    }
    part = kept.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **arrays, facts=np.array(json.dumps(facts)))
    part.replace(kept)


def _texts(folders: Sequence[str], most: int) -> Iterator[tuple[bytes, str]]:
    """(checksum, text) of different files in the order of their checksums, up to so many bytes."""
    found: dict[bytes, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and 200 < path.stat().st_size <= LARGEST_FILE:
                found.setdefault(hashlib.blake2b(path.read_bytes(), digest_size=8).digest(), path)
    read = 0
    for digest in sorted(found):
        text = found[digest].read_text(encoding="utf-8", errors="ignore")
        read += len(text)
        if read > most:
            return
        yield digest, text


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a little text")
    options = parser.parse_args()
    print(tokens(TINY if options.rehearse else FULL).facts)


if __name__ == "__main__":
    main()

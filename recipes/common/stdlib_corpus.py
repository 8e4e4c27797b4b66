"""Real text that needs no network: the documentation and docstrings of the running Python's standard library.

What is read
    Every `.py` file of the standard library except its test suites, in the order of the module names, and the
    language reference topics that `help()` shows (`pydoc_data.topics`). Files are parsed with `ast`; nothing of the
    library is imported or run. The text depends on the Python release alone (about 2 million characters in 3.11).

How it is split
    By file: a file belongs to the validation split if the CRC-32 of its module name falls into the last
    `validation_share` of the range. That needs no random state and does not change when another file comes or goes.
    The language reference topics are one file, `pydoc_data/topics.py`; their pages quote each other, so they are
    always training text.

Nothing of validation is in training
    The library repeats itself (a C module's Python twin has the same docstrings). A paragraph that also stands in a
    validation file is taken out of the training documents, and a code-docstring pair whose code or docstring also
    stands in a validation file is not a training pair.

Licence of the text: Python Software Foundation License Version 2, copyright Python Software Foundation.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = [
    "DocstringPair",
    "Document",
    "docstring_pairs",
    "documents",
    "load_docstring_pairs",
    "load_documents",
    "paragraph_keys",
    "without_paragraphs",
]

logger = logging.getLogger(__name__)

TOPICS = "pydoc_data.topics"
TEST_PACKAGES = {"test", "tests", "idle_test"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Document(NamedTuple):
    """A text and where it comes from: `source` is a module's dotted name, or `pydoc_data.topics:` and a topic."""

    source: str
    text: str


class DocstringPair(NamedTuple):
    """The code of a function, method or class with every docstring taken out, and the docstring that it had."""

    source: str
    name: str
    code: str
    docstring: str


Row = TypeVar("Row", Document, DocstringPair)


def documents(root: str | Path | None = None) -> Iterator[Document]:
    """Yield one document for each module that has docstrings, then one for each language reference topic.

    A module's document lists its docstrings in the order of the file, each under the signature it belongs to, as
    `help()` does.

    Args:
        root: Folder of the standard library. Default: that of the running Python.

    Yields:
        Documents in an order that depends on module and topic names alone.

    Example:
        >>> text = next(document.text for document in documents() if document.source == "genericpath")
        >>> print(text[text.index("genericpath.commonprefix"):].splitlines()[0])
        genericpath.commonprefix(m)
    """
    for module, _, tree in _modules(root):
        text = _module_text(module, tree)
        if text:
            yield Document(module, text)
    for topic, text in sorted(_topics(root).items()):
        yield Document(f"{TOPICS}:{topic}", text.strip())


def docstring_pairs(root: str | Path | None = None) -> Iterator[DocstringPair]:
    """Yield (code, docstring) of every function, method and class that has both, in the order of `documents`.

    Left out: definitions whose whole body is their docstring, since there is no code to describe.

    Args:
        root: Folder of the standard library. Default: that of the running Python.

    Yields:
        Pairs with dedented code, free of docstrings at every depth, and the docstring as `inspect.cleandoc` gives it.

    Example:
        >>> pair = next(pair for pair in docstring_pairs() if pair.name == "commonprefix")
        >>> print(pair.code.splitlines()[0])
        def commonprefix(m):
        >>> pair.docstring
        'Given a list of pathnames, returns the longest common leading component'
    """
    for module, source, tree in _modules(root):
        lines = source.encode().splitlines(keepends=True)
        for name, node in _definitions(tree):
            docstring = ast.get_docstring(node)
            if docstring and len(node.body) > 1:
                yield DocstringPair(module, name, _code_without_docstrings(node, lines), docstring)


def load_documents(validation_share: float = 0.1, root: str | Path | None = None) -> DatasetDict:
    """Return `documents` as a `DatasetDict` with the columns source and text, split by file.

    Args:
        validation_share: Expected share of the files that go to validation, between 0 and 1.
        root: Folder of the standard library. Default: that of the running Python.

    Returns:
        The splits `train` and `validation`; no paragraph of validation is in train.

    Raises:
        ValueError: If `validation_share` is not between 0 and 1.
        FileNotFoundError: If no documentation is found under `root`.
    """
    train, validation = _split(documents(root), validation_share, root)
    held_out = {key for document in validation for key in paragraph_keys(document.text)}
    kept = (document._replace(text=without_paragraphs(document.text, held_out)) for document in train)
    return _dataset_dict([document for document in kept if document.text], validation, Document._fields)


def load_docstring_pairs(validation_share: float = 0.1, root: str | Path | None = None) -> DatasetDict:
    """Return `docstring_pairs` as a `DatasetDict` with the columns source, name, code and docstring, split by file.

    Args:
        validation_share: Expected share of the files that go to validation, between 0 and 1.
        root: Folder of the standard library. Default: that of the running Python.

    Returns:
        The splits `train` and `validation`; no code and no docstring of validation is in train.

    Raises:
        ValueError: If `validation_share` is not between 0 and 1.
        FileNotFoundError: If no documentation is found under `root`.
    """
    train, validation = _split(docstring_pairs(root), validation_share, root)
    held_out = {_key(text) for pair in validation for text in (pair.code, pair.docstring)}
    kept = [pair for pair in train if held_out.isdisjoint((_key(pair.code), _key(pair.docstring)))]
    return _dataset_dict(kept, validation, DocstringPair._fields)


def _modules(root: str | Path | None) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (dotted name, source, syntax tree) of the standard library's modules, sorted by name."""
    root = _library(root)
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and TEST_PACKAGES.isdisjoint(parts):
            names[".".join(parts).removesuffix(".__init__")] = path
    names.pop(TOPICS, None)
    for name, path in sorted(names.items()):
        try:
            # A vendored file may not be UTF-8 or may warn about its own escapes; neither is ours to report.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = path.read_text(encoding="utf-8")
                tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            logger.debug("left out %s: %s", path, error)
        else:
            yield name, source, tree


def _library(root: str | Path | None) -> Path:
    return Path(root if root is not None else sysconfig.get_path("stdlib"))


def _topics(root: str | Path | None) -> dict[str, str]:
    path = _library(root).joinpath(*TOPICS.split(".")).with_suffix(".py")
    if not path.is_file():  # some distributions split pydoc's data off
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            return ast.literal_eval(node.value)
    return {}


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield (qualified name, node) of the functions, methods and classes, in the order of the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):  # expressions define nothing
            yield from _definitions(node, prefix)


def _module_text(module: str, tree: ast.Module) -> str:
    parts = []
    if docstring := ast.get_docstring(tree):
        parts.append(docstring)
    for name, node in _definitions(tree):
        if docstring := ast.get_docstring(node):
            parts.append(f"{_signature(module, name, node)}\n\n{docstring}")
    return "\n\n".join([module, *parts]) if parts else ""


def _signature(module: str, name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {module}.{name}"
    return f"{module}.{name}({ast.unparse(node.args)})"


def _code_without_docstrings(node: Definition, lines: list[bytes]) -> str:
    """Cut the definition out of its file's lines, less every docstring in it; positions are UTF-8 bytes, as in ast."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    code = lines[first - 1 : node.end_lineno]
    nested = [inner for inner in ast.walk(node) if isinstance(inner, Definition) and ast.get_docstring(inner, False)]
    for docstring in sorted((inner.body[0] for inner in nested), key=lambda part: part.lineno, reverse=True):
        begin, end = docstring.lineno - first, docstring.end_lineno - first  # type: ignore[operator]
        before, after = code[begin][: docstring.col_offset], code[end][docstring.end_col_offset :]
        is_whole_body = any(inner.body == [docstring] for inner in nested)
        rest = b"..." + after if is_whole_body else after.lstrip(b" ;")
        code[begin : end + 1] = [before + rest] if before.strip() or rest.strip() else []
    text = b"".join(code).decode()
    indent = re.match(r"[ \t]*", text).group()  # type: ignore[union-attr]
    return "\n".join(line.removeprefix(indent) for line in text.splitlines()).strip()


def _split(items: Iterator[Row], validation_share: float, root: str | Path | None) -> tuple[list[Row], list[Row]]:
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}; it must lie between 0 and 1, for example 0.1.")
    train: list[Row] = []
    validation: list[Row] = []
    for item in items:
        is_topic = item.source.startswith(TOPICS)
        last = zlib.crc32(item.source.encode()) >= (1 - validation_share) * 2**32
        (validation if last and not is_topic else train).append(item)
    if not train and not validation:
        raise FileNotFoundError(f"no documented Python module in {_library(root)}; give the folder that has os.py.")
    return train, validation


def _dataset_dict(train: list, validation: list, columns: tuple[str, ...]) -> DatasetDict:
    from datasets import Dataset, DatasetDict  # heavy, and the functions above work without it

    splits = {"train": train, "validation": validation}
    return DatasetDict(
        {
            split: Dataset.from_dict({column: [getattr(row, column) for row in rows] for column in columns})
            for split, rows in splits.items()
        }
    )


def _key(text: str) -> str:
    """Two texts have the same key if they differ in white space alone."""
    return " ".join(text.split())


def paragraph_keys(text: str) -> set[str]:
    """What `without_paragraphs` needs to know of a text in order to take its paragraphs out of another."""
    return {_key(paragraph) for paragraph in re.split(r"\n\s*\n", text)}


def without_paragraphs(text: str, held_out: set[str]) -> str:
    """The text less every paragraph that stands in a held-out one."""
    return "\n\n".join(paragraph for paragraph in re.split(r"\n\s*\n", text) if _key(paragraph) not in held_out)

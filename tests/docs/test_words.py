"""README and the pages of docs are easy to read: short sentences, no bracket within a bracket, a task on top."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/**/*.md")})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MOST_WORDS = 25


def blocks(text):
    """The paragraphs and list items of a page as lines of words: no code, tables, headings, pictures, addresses."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!-- results: .*?<!-- /results -->|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"<[^>\n]+>", "", text)
    text = re.sub(r"``[^`]+``|`[^`]+`", "CODE", text)
    text = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^( *)(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#|:::|!!!|\?\?\?|\[\w+\]:|--)", line)]
        if " ".join(lines).strip():
            yield " ".join(" ".join(lines).split())


def sentences(text):
    for block in blocks(text):
        yield from re.split(r"(?<=[.!?])[\"')*]* (?=[A-Z\"'(*\d])", block)


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


def depth(text):
    """How many brackets at most are open at once."""
    deepest = now = 0
    for letter in text:
        now = max(0, now + {"(": 1, ")": -1}.get(letter, 0))
        deepest = max(deepest, now)
    return deepest


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_is_long(name):
    long = [
        f"{len(words(sentence))}: {sentence}"
        for sentence in sentences((ROOT / name).read_text(encoding="utf-8"))
        if len(words(sentence)) > MOST_WORDS
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("name", NAMES)
def test_no_bracket_stands_within_a_bracket(name):
    nested = [block for block in blocks((ROOT / name).read_text(encoding="utf-8")) if depth(block) > 1]
    assert not nested, "\n".join(nested)


def test_what_is_measured_here_is_measured():
    page = (
        "# A title of " + "many " * 30 + "words\n\nFive words (one bracket) here. Two more.\n\n```bash\n"
        "not (one (word))\n```\n\n| a (table (too)) |\n\n- an [item](with/address.md) and `code of words`\n- two\n"
    )
    assert list(sentences(page)) == ["Five words (one bracket) here.", "Two more.", "an item and CODE", "two"]
    assert depth("a (b (c))") == 2
    assert depth("a (b) (c)") == 1

"""The offline text: deterministic, split by file, nothing of validation in training, code free of its docstrings."""

import ast
import textwrap

import pytest

from recipes.common.stdlib_corpus import DocstringPair, docstring_pairs, documents, load_docstring_pairs, load_documents

LIBRARY = {
    "abc.py": '''
        """Abstract base classes."""

        @decorated
        def first(x, *, y=1):
            """Add — and keep “quotes”.

            Longer text of the docstring.
            """
            # a comment stays
            return "é", x + y

        class Shape:
            """A shape."""

            def only_text(self):
                """No code here."""

            def area(self): """On one line."""; return 0

        if True:
            def hidden():
                "Found below an if."
                return 1
        ''',
    "json/__init__.py": '"""JSON.\n\nA paragraph that two files share."""\n',
    "json/decoder.py": (
        '"""Decode.\n\nA paragraph that two\nfiles share."""\ndef load():\n    """Load."""\n    return 1\n'
    ),
    "json/tests/test_it.py": '"""A test suite."""\n',
    "site-packages/json/other.py": '"""Not the standard library."""\n',
    "ast.py": "def broken(:\n",
    "pydoc_data/topics.py": "topics = {'yield': 'The yield statement.', 'assert': 'The assert statement.'}\n",
}


@pytest.fixture
def library(tmp_path):
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def real_documents():
    return load_documents()


@pytest.fixture(scope="module")
def real_pairs():
    return load_docstring_pairs()


def test_documents_come_by_module_name_then_by_topic_without_tests_packages_and_broken_files(library):
    assert [document.source for document in documents(library)] == [
        "abc",
        "json",
        "json.decoder",
        "pydoc_data.topics:assert",
        "pydoc_data.topics:yield",
    ]


def test_a_document_reads_like_help(library):
    text = next(documents(library)).text
    assert text.startswith("abc\n\nAbstract base classes.\n\nabc.first(x, *, y=1)\n\nAdd — and keep “quotes”.")
    assert "class abc.Shape\n\nA shape.\n\nabc.Shape.only_text(self)\n\nNo code here." in text
    assert text.endswith("abc.hidden()\n\nFound below an if.")


def test_pairs_have_code_without_any_docstring_and_the_docstring_as_completion(library):
    pairs = {pair.name: pair for pair in docstring_pairs(library)}
    assert pairs["first"] == DocstringPair(
        "abc",
        "first",
        '@decorated\ndef first(x, *, y=1):\n    # a comment stays\n    return "é", x + y',
        "Add — and keep “quotes”.\n\nLonger text of the docstring.",
    )
    assert pairs["Shape"].code == (
        "class Shape:\n\n    def only_text(self):\n        ...\n\n    def area(self): return 0"
    )
    assert pairs["Shape.area"].code == "def area(self): return 0"
    assert pairs["hidden"].code == "def hidden():\n    return 1"


def test_definitions_without_code_are_no_pairs(library):
    assert "Shape.only_text" not in {pair.name for pair in docstring_pairs(library)}


def test_a_paragraph_of_a_validation_file_leaves_the_training_text(library):
    # At a share of 0.2 the CRC-32 of `json.decoder` puts it into validation, and of `json` into training.
    splits = load_documents(0.2, library)
    assert "json.decoder" in splits["validation"]["source"]
    train = dict(zip(splits["train"]["source"], splits["train"]["text"], strict=True))
    assert train["json"] == "json\n\nJSON."


def test_the_real_library_gives_the_same_splits_twice(real_documents):
    again = load_documents()
    for split in ("train", "validation"):
        assert real_documents[split].to_dict() == again[split].to_dict()


def test_the_real_library_is_enough_to_train_on(real_documents):
    size = {split: sum(map(len, real_documents[split]["text"])) for split in real_documents}
    assert size["train"] > 1_000_000
    assert 0.02 < size["validation"] / size["train"] < 0.2


def test_no_file_and_no_paragraph_is_in_both_splits_of_the_real_library(real_documents):
    def paragraphs(split):
        texts = real_documents[split]["text"]
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n")} - {""}

    assert set(real_documents["train"]["source"]).isdisjoint(real_documents["validation"]["source"])
    assert paragraphs("train").isdisjoint(paragraphs("validation"))


def test_no_module_code_or_docstring_is_in_both_splits_of_the_real_pairs(real_pairs):
    for column in ("source", "code", "docstring"):
        assert set(real_pairs["train"][column]).isdisjoint(real_pairs["validation"][column]), column


def test_every_real_pair_parses_and_holds_no_docstring(real_pairs):
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for row in (row for split in real_pairs.values() for row in split):
        for node in ast.walk(ast.parse(row["code"])):
            if isinstance(node, definitions):
                assert ast.get_docstring(node) is None, (row["source"], row["name"])


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share, library):
    with pytest.raises(ValueError, match=r"validation_share is .* between 0 and 1"):
        load_documents(share, library)


def test_a_folder_without_modules_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no documented Python module in .* os\.py"):
        load_docstring_pairs(root=tmp_path)

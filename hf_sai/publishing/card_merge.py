"""Brings a new card and one that is there together, so that nothing a person wrote is lost."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData

from hf_sai.publishing.card_yaml import dump_metadata, load_metadata
from hf_sai.runs.files import read_text
from hf_sai.runs.paths import is_local_path

__all__ = ["TEMPLATE", "Card", "is_hub_id", "load_card", "merge_data", "merge_text", "words_of_a_person"]

#: The body of a card.
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
MAX_CARD_BYTES = 4 * 2**20
MAX_YAML_DEPTH = 50
#: Metadata in which the old card's entries are kept beside the new ones; elsewhere the old card's value stays, ...
_UNITED = ("tags", "datasets", "metrics")
#: ... except for what is measured or follows from the run.
_MEASURED = ("eval_results", "model_name", "library_name")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_BASE_TAG = "base_model:adapter:"

_SECTION = re.compile(r"<!-- hf-sai:(\w+) -->\n.*?<!-- /hf-sai:\1 -->", re.DOTALL)
_TRAINER_COMMENT = "automatically according to the information the Trainer had access to"
_TRAINER_GAPS = ("Model description", "Intended uses & limitations", "Training and evaluation data")


class Card(ModelCard):
    """huggingface_hub's card, with metadata written as the Hub reads it.

    Args:
        data: The metadata.
        text: The body.
        source: The card as it stood in a file.
    """

    def __init__(self, data: CardData, text: str, source: str = "") -> None:
        self.data, self.text, self.source = data, text, source

    @property  # type: ignore[misc]
    def content(self) -> str:
        """The card with its metadata."""
        return f"---\n{dump_metadata(self.data.to_dict())}\n---\n{self.text}"


def is_hub_id(value: object) -> bool:
    """Whether a value can be the name of a repository on the Hub; a path of this machine cannot."""
    return isinstance(value, str) and len(value) <= 96 and _HUB_ID.fullmatch(value) is not None and ".." not in value


def load_card(path: str | Path) -> Card:
    """Read a card that anybody may have made.

    Args:
        path: The Markdown file.

    Returns:
        The card.

    Raises:
        ValueError: It is too large, not UTF-8, or its metadata is no plain YAML mapping the Hub would take.
    """
    content = read_text(path, MAX_CARD_BYTES)
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    try:
        if block is None:
            return Card(ModelCardData(), content, content)
        _check_yaml(block.group(1))
        return Card(ModelCardData(**load_metadata(block.group(1))), content[block.end() :], content)
    except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata of {path} cannot be read ({reason}); mend or remove it") from None


def merge_text(old: str, new: str) -> tuple[str, bool]:
    """The new card's sections within the old card's text.

    Args:
        old: Text of the card that is there, without metadata.
        new: Text of the new card.

    Returns:
        The text, and whether it replaced one that a tool had written and nobody touched.
    """
    fresh = {match.group(1): match.group(0) for match in _SECTION.finditer(new)}
    if _SECTION.search(old):
        return _SECTION.sub(lambda match: fresh.get(match.group(1), match.group(0)), old), False
    if not old.strip():
        return new, False
    if _is_untouched(old):
        return new, True
    return f"{old.rstrip()}\n\n{new}", False


def words_of_a_person(path: str | Path, new: str = "") -> list[str]:
    """Lines and metadata of a card that a person wrote, as far as a new card would lose them.

    Args:
        path: The card that is there.
        new: The text of the new card; empty where it is not known yet.

    Returns:
        The lines; none for a card that a tool wrote and nobody touched.

    Raises:
        ValueError: The card that is there cannot be read.
    """
    old = load_card(path)
    if not old.text.strip() or (not _SECTION.search(old.text) and _is_untouched(old.text)):
        return []
    kept = {
        line.strip()
        for line in [*new.splitlines(), *_SECTION.sub("", read_text(TEMPLATE, MAX_CARD_BYTES)).splitlines()]
    }
    own = [line.strip() for line in _SECTION.sub("", old.text).splitlines() if line.strip()]
    if _SECTION.search(old.text):  # its title is the run's name
        own = [line for line in own if not line.startswith("# ")]
    return [line for line in own if line not in kept]


def merge_data(old: CardData, new: CardData) -> ModelCardData:
    """The metadata of both cards: lists united, measurements renewed, and else what the old card says.

    Args:
        old: Metadata of the card that is there.
        new: Metadata of the new card.

    Returns:
        The metadata of the merged card.
    """
    before, after = dict(old.__dict__), dict(new.__dict__)
    if before.get("licence") == "license":  # TRL's template says so where it means nothing
        del before["licence"]
    # PEFT writes the path a local base model was loaded from, and None for a base without a name.
    before["base_model"] = [name for name in _list(before.get("base_model")) if _is_base(name)] or None
    if before["base_model"] and len(before["base_model"]) == 1:
        before["base_model"] = before["base_model"][0]
    merged = {**after, **{key: value for key, value in before.items() if value is not None and key not in _MEASURED}}
    for key in _UNITED:
        merged[key] = list(dict.fromkeys([*_list(before.get(key)), *_list(after.get(key))])) or None
    tags = (tag for tag in merged["tags"] or [] if not tag.startswith(_BASE_TAG) or _is_base(tag[len(_BASE_TAG) :]))
    merged["tags"] = list(tags) or None
    results = list(after.get("eval_results") or [])
    measured = {(r.task_type, r.dataset_name, r.metric_type, r.metric_name) for r in results}
    others = [
        r
        for r in before.get("eval_results") or []
        if (r.task_type, r.dataset_name, r.metric_type, r.metric_name) not in measured
    ]
    merged["eval_results"] = [*results, *others] or None
    if merged["eval_results"] and not merged.get("model_name"):
        merged["model_name"] = before.get("model_name") or "model"
    return ModelCardData(**{key: value for key, value in merged.items() if value is not None})


def _check_yaml(block: str) -> None:
    """Raise ValueError for YAML that is small to write and costly to load."""
    depth = 0
    for event in yaml.parse(block, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):  # a few lines of them stand for billions of entries
            raise ValueError("YAML aliases are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} levels deep")


def _is_untouched(text: str) -> bool:
    """Whether a tool wrote the text and nobody changed it, as far as its lines can tell."""
    if _TRAINER_COMMENT in text:
        return all(f"## {gap}\n\nMore information needed" in text for gap in _TRAINER_GAPS)
    templates = [Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"]  # PEFT's too
    if "trl" in sys.modules:
        templates.append(Path(str(resources.files("trl"))) / "templates" / "lm_model_card.md")
    return any(path.is_file() and _fits(text, path.read_text(encoding="utf-8")) for path in templates)


def _fits(text: str, template: str) -> bool:
    """Whether every line of the text is one that the template can make, or one that PEFT adds."""
    body = re.sub(r"\A---.*?^---$", "", template, flags=re.DOTALL | re.MULTILINE)
    known = {re.sub(r"{%.*?%}", "", line).strip() for line in body.splitlines()} | {"### Framework versions"}
    known |= set(re.findall(r'default\("(.*?)"', body))
    # What PEFT, and diffusers' and transformers' push_to_hub, write into huggingface_hub's template.
    patterns = [r"- PEFT [\w.+-]+", r"This is the model card of a .* pushed on the Hub\. .* automatically generated\."]
    for line in body.splitlines():
        begin, end = re.match(r"\s*([^{]*)", line), re.search(r"([^}]*)$", line)
        if "{" in line and begin and end and begin.group(1).strip():
            patterns.append(re.escape(begin.group(1)) + ".*" + re.escape(end.group(1).strip()))
    can_be = re.compile("|".join(patterns))
    return all(line in known or can_be.fullmatch(line) for line in map(str.strip, text.splitlines()))


def _is_base(name: str) -> bool:
    return name != "None" and is_hub_id(name) and not is_local_path(name)


def _list(value: object) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]

"""The Jinja filters of model cards, and the code that loads each kind of model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hf_sai.runs.record import RunRecord, is_number
from hf_sai.runs.units import human_bytes

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["environment", "library", "usage_code"]

MAX_SAMPLE_CHARACTERS = 1500
#: Module to library, as the Hub spells it.
_LIBRARIES = {
    "transformers": "transformers",
    "peft": "peft",
    "diffusers": "diffusers",
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
    "setfit": "setfit",
    "open_clip": "open_clip",
}
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
}

#: What a template may ask a record for; the rest writes or reads files.
_ASKED = ("curve", "keys", "metrics", "summary")


def environment() -> SandboxedEnvironment:
    """Jinja with the cards' filters, in its sandbox: a template reads values and calls nothing dangerous."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def is_safe_callable(self, obj: Any) -> bool:
            of_record = isinstance(getattr(obj, "__self__", None), RunRecord) or obj == RunRecord.load
            return super().is_safe_callable(obj) and (not of_record or obj.__name__ in _ASKED)

    jinja = Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    jinja.filters.update(
        md=markdown_text,
        plain=_plain,
        code=code_block,
        url=lambda text: quote(str(text), safe="/"),
        number=_shown(lambda value: f"{value:.4g}"),
        count=_shown(lambda value: f"{value:,}"),
        bytes=_shown(human_bytes),
        percent=_shown(lambda value: f"{100 * value:.1f} %"),
        truncated=lambda text: text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + " ...",
    )
    return jinja


def _shown(form: Callable[[Any], str]) -> Callable[[Any], str]:
    """A filter that shows numbers in a form, and a dash for what is missing or no number."""
    return lambda value: form(value) if is_number(value) else "–"  # noqa: RUF001


def markdown_text(value: Any) -> str:
    """A value as one line of Markdown in which nothing is markup: no HTML, table cell, link, heading or comment.

    Example:
        >>> markdown_text("a | <b>*x*</b>")
        'a \\\\| &lt;b&gt;\\\\*x\\\\*&lt;/b&gt;'
    """
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores within a word are no emphasis, and names are full of them.
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def code_block(text: Any, language: str = "") -> str:
    """A fenced block that holds any text: the fence is longer than every run of backticks in it."""
    # Markers of sections must not come from a record: a comment in a block is no comment.
    text = str(text).replace("<!-- hf-sai:", "<!-- hf-sai ").replace("<!-- /hf-sai:", "<!-- /hf-sai ")
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def library(record: RunRecord) -> str | None:
    """The library that loads the model, as the Hub calls it; None where nobody knows.

    A class of the training script itself, or of a module beside it, is transformers' where it has such a configuration.
    """
    name = str(record.model.get("library"))
    if name in _LIBRARIES:
        return _LIBRARIES[name]
    return "transformers" if isinstance(record.model.get("type"), str) and not record.model.get("adapter") else None


def usage_code(
    record: RunRecord, repo_id: str, task: str | None, revision: str | None = None, subfolder: str | None = None
) -> str:
    """Python code that loads the model and uses it.

    Args:
        record: The run.
        repo_id: The model's place, on the Hub or on disk.
        task: Its pipeline tag.
        revision: Its branch; default: main.
        subfolder: Where in its place an adapter lies.

    Returns:
        Code that runs as it is where the model can be found.
    """
    is_adapter = bool(record.model.get("adapter"))
    place = repr(repo_id) if revision in (None, "main") else f"{repo_id!r}, revision={revision!r}"
    if library(record) == "diffusers":
        return _diffusers_code(record, place, is_adapter)
    if is_adapter and subfolder is not None:
        return _named_adapter_code(record, place, task, repr(subfolder))
    if task != "text-generation":
        kind = str(record.model.get("class"))
        if record.model.get("library") != "transformers" or not re.fullmatch(r"[A-Za-z]\w*", kind):
            kind = _AUTO.get(str(task), "AutoModel")
        if library(record) == "transformers":
            return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({place})"
        if is_adapter:
            return f"from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained({place})"
        return f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({place})"
    module, auto = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    imports = f"from {module} import {auto}\n" if is_adapter else ""
    names = "AutoTokenizer" if is_adapter else f"{auto}, AutoTokenizer"
    return (
        f"{imports}from transformers import {names}\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n"
        f"model = {auto}.from_pretrained({place})\n"
        f"{_inputs_code(record)}\n"
        "output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=50)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


def _named_adapter_code(record: RunRecord, place: str, task: str | None, folder: str) -> str:
    """PEFT's automatic classes would look for the base model in the adapter's folder, so it is loaded by itself."""
    auto = _AUTO.get(str(task), "AutoModel")
    is_text = task == "text-generation"
    code = (
        "from peft import PeftConfig, PeftModel\n"
        f"from transformers import {auto}{', AutoTokenizer' if is_text else ''}\n\n"
        f"config = PeftConfig.from_pretrained({place}, subfolder={folder})\n"
        f"base = {auto}.from_pretrained(config.base_model_name_or_path)\n"
        f"model = PeftModel.from_pretrained(base, {place}, subfolder={folder})"
    )
    if not is_text:
        return code
    return (
        f"{code}\ntokenizer = AutoTokenizer.from_pretrained({place})\n{_inputs_code(record)}\n"
        "output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=50)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


def _diffusers_code(record: RunRecord, place: str, is_adapter: bool) -> str:
    base = repr(str(record.model.get("base_model") or "BASE_MODEL"))
    adapter = f"pipeline.load_lora_weights({place})\n" if is_adapter else ""
    prompts = record.settings.get("validation_prompts")
    prompt = prompts[0] if isinstance(prompts, list) and prompts else "a photo"
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({base if is_adapter else place})\n{adapter}"
        f'pipeline({str(prompt)!r}).images[0].save("image.png")'
    )


def _inputs_code(record: RunRecord) -> str:
    """Code for the model's inputs: a chat where the first sample answers one, else a text to go on with."""
    messages = record.samples[0].get("messages") if record.samples else None
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        return f'inputs = tokenizer({_prompt(record)!r}, return_tensors="pt")'
    told = [{key: str(message.get(key, "")) for key in ("role", "content")} for message in messages]
    listed = "".join(f"    {message!r},\n" for message in told)
    return (
        f"messages = [\n{listed}]\n"
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
    )


def _prompt(record: RunRecord) -> str:
    prompts = [sample["prompt"] for sample in record.samples if isinstance(sample.get("prompt"), str)]
    return prompts[0] if prompts else "Return the"


def _plain(value: Any) -> str:
    """For inline code, in which a backtick cannot be escaped."""
    return " ".join(str(value).split()).replace("`", "'")

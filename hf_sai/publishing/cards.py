"""Model cards from run records: metadata that the Hub validates, and text that keeps what a user wrote.

The text comes from a Jinja template (``templates/model_card.md.jinja``, or the user's own), which sees:
``record`` (:class:`hf_sai.runs.record.RunRecord`), ``runs`` (its summary, then its twins'), ``metric_names``,
``pictures`` (the files in ``pictures/``), ``usage``, ``commands``, ``settings``, ``options``, ``versions``,
``samples``, ``images`` and a few short texts; and the filters ``md`` (escapes text for Markdown), ``code`` (a fenced
block), ``number``, ``count``, ``bytes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCardData

from hf_sai.publishing.card_merge import MAX_CARD_BYTES, TEMPLATE, Card, is_hub_id, load_card, merge_data, merge_text
from hf_sai.publishing.card_text import code_block, environment, library, usage_code
from hf_sai.publishing.files_to_publish import adapter_folder
from hf_sai.runs.files import atomic_write, read_text
from hf_sai.runs.record import RECORD_FILE, RunRecord

__all__ = [
    "CARD_FILE",
    "TEMPLATE",
    "base_model",
    "card_data",
    "card_for_hub",
    "prepare_card",
    "render_card",
    "write_card",
]

CARD_FILE = "README.md"
#: Keeps a card that another tool wrote, the first time it is replaced.
BACKUP_FILE = "README.before-hf-sai.md"
MAX_TEMPLATE_BYTES = 2**20
MAX_SAMPLES = 8

#: The training arguments that matter for the result, of Trainer's 120.
_SETTINGS = (
    "seed",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "max_grad_norm",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "group_by_length",
)
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "UNet2DConditionModel": "text-to-image",
    "Transformer2DModel": "text-to-image",
}
#: Images in folders that are published with the run.
_OWN_IMAGE = re.compile(r"(images|samples)/[\w.-]+\.png", re.ASCII)
_NOT_METADATA = ("description", "limits")
_DEFAULT_LIMITS = (
    "Evaluated only as shown above. What its data and its base model lack or get wrong, it lacks and gets wrong too."
)


def write_card(
    directory: str | Path,
    *,
    twins: Iterable[str | Path] = (),
    template: str | Path | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write, or bring up to date, the model card of a run.

    Sections between ``hf-sai`` comments are written anew; other text, metadata and evaluation results in the card
    stay. A card that Trainer, TRL or PEFT wrote and nobody touched is replaced (and kept once as
    ``README.before-hf-sai.md``); to any other card the sections are added below.

    Args:
        directory: The run's directory, with its ``run_record.json``.
        twins: Directories or records of runs to compare with; their summaries go into the record.
        template: A Jinja template instead of the package's own.
        repo_id: Where the model will be on the Hub, for the code that loads it; default: ``hub_model_id`` in the
            settings, else the run's directory as it was given to the training, else its name.

    Returns:
        The card's path.

    Raises:
        ValueError: The record, the template or the card that is there cannot be read.
        OSError: The card cannot be written; the old one is unchanged.
    """
    files = prepare_card(directory, twins=twins, template=template, repo_id=repo_id)
    return [atomic_write(path, text) for path, text in files.items()][-1]


def prepare_card(
    directory: str | Path,
    *,
    twins: Iterable[str | Path] = (),
    template: str | Path | None = None,
    repo_id: str | None = None,
    pictures: Iterable[str] = (),
) -> dict[Path, str]:
    """What :func:`write_card` would write, without writing it.

    Args:
        directory: As for :func:`write_card`.
        twins: As for :func:`write_card`.
        template: As for :func:`write_card`.
        repo_id: As for :func:`write_card`.
        pictures: Names of files that ``pictures/`` is about to get, beside those that are there.

    Returns:
        Path to text, to be written in this order: the record if there are new twins, the copy of a card that is
        replaced, and the card.

    Raises:
        ValueError: As for :func:`write_card`.
    """
    directory = Path(directory)
    record, files = RunRecord.load(directory), {}
    summaries = [RunRecord.load(twin).summary() for twin in twins]
    if summaries:
        record.twins = summaries
        files[directory / RECORD_FILE] = record.to_text()
    known = {path.name for path in (directory / "pictures").glob("*.png")}
    card = render_card(
        record,
        template=template,
        repo_id=repo_id,
        pictures=sorted({*known, *pictures}),
        subfolder=adapter_folder(directory),
    )
    path = directory / CARD_FILE
    if path.exists():
        old = load_card(path)
        text, replaced = merge_text(old.text, card.text)
        if replaced and not (directory / BACKUP_FILE).exists():
            files[directory / BACKUP_FILE] = old.source
        card = _card(merge_data(old.data, card.data), text)
    return {**files, path: str(card)}


def render_card(
    record: RunRecord,
    *,
    template: str | Path | None = None,
    repo_id: str | None = None,
    pictures: Iterable[str] = (),
    subfolder: str | None = None,
) -> Card:
    """A new card from a record alone.

    Args:
        record: The run.
        template: A Jinja template instead of the package's own; it runs in Jinja's sandbox.
        repo_id: The model's place on the Hub or on disk.
        pictures: Names of the files in ``pictures/``.
        subfolder: Where in the model's place PEFT saved an adapter that has a name of its own.

    Returns:
        The card, a ``huggingface_hub.ModelCard``.

    Raises:
        ValueError: The template cannot be read or rendered.
    """
    import jinja2

    source = read_text(template or TEMPLATE, MAX_TEMPLATE_BYTES)
    try:
        text = environment().from_string(source).render(_context(record, repo_id, set(pictures), subfolder))
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        place = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"template {template or TEMPLATE}{place}: {type(error).__name__} {error}") from error
    return _card(card_data(record), re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def card_for_hub(directory: str | Path, repo_id: str, revision: str | None = None) -> str:
    """A run's card as it is on disk, but with code that loads the model from the Hub.

    Args:
        directory: The run's directory.
        repo_id: The repository.
        revision: Its branch; default: main.

    Returns:
        The card. The code is left alone if a person, or another template, wrote it.

    Raises:
        ValueError: The card cannot be read.
    """
    text = read_text(Path(directory) / CARD_FILE, MAX_CARD_BYTES)
    try:
        record = RunRecord.load(directory)
    except ValueError:
        return text
    anywhere = "hf-sai-any-place"
    folder = adapter_folder(directory)
    written = code_block(usage_code(record, anywhere, _task(record), subfolder=folder), "python")
    place = r"""(?:'[^'\n]*'|"[^"\n]*")(?:, revision='[^'\n]*')?"""
    pattern = re.escape(written).replace(re.escape(repr(anywhere)), place)
    new = code_block(usage_code(record, repo_id, _task(record), revision, folder), "python")
    return re.sub(pattern, lambda _: new, text, count=1)


def card_data(record: RunRecord) -> ModelCardData:
    """The card's metadata: library, base model, data sets, tags, task, and the measured metrics as a model index."""
    known = {key: value for key, value in _mapping(record.run.get("card")).items() if key not in _NOT_METADATA}
    task = known.pop("pipeline_tag", None) or _task(record)
    tags = ["hf-sai", *(["sgd-sai"] if _is_sai(record) else [])]
    if record.model.get("adapter"):
        tags.append(str(_mapping(record.model["adapter"]).get("peft_type", "adapter")).lower())
    datasets = [source["id"] for source in record.data if is_hub_id(source.get("id"))]
    metrics = record.metrics()
    fields: dict[str, Any] = {
        "model_name": record.name,
        "library_name": library(record),
        "base_model": base_model(record),
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys(datasets)) or None,
        "metrics": [name for name in metrics if name != "loss"] or None,
        "eval_results": _eval_results(record, metrics, task) or None,
    }
    # What lies on this machine is nobody else's business.
    bases, known["datasets"] = (_on_the_hub(known.pop(key, None)) for key in ("base_model", "datasets"))
    if bases and len(bases) > 1:
        known["base_model"] = bases
    fields.update({key: value for key, value in known.items() if value is not None})
    fields["tags"] = list(dict.fromkeys([*tags, *_strings(known.get("tags"))]))
    return ModelCardData(**{key: _one_line(value) for key, value in fields.items() if value is not None})


def _eval_results(record: RunRecord, metrics: Mapping[str, float], task: str | None) -> list[EvalResult]:
    """The metrics for the model index, which needs the data set's id on the Hub; without one they are text only."""
    source = next((source for source in _evaluation_data(record) if is_hub_id(source.get("id"))), None)
    if source is None:
        return []
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=source["id"],
            dataset_name=_one_line(source["name"]),
            dataset_split="validation" if "validation" in str(source.get("role")) else None,
            metric_type=_one_line(metric),
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def _evaluation_data(record: RunRecord) -> list[dict[str, Any]]:
    """The sources it was evaluated on, or all where none says so."""
    found = [source for source in record.data if re.search("validation|test", str(source.get("role")))]
    return found or record.data


def _context(record: RunRecord, repo_id: str | None, pictures: set[str], subfolder: str | None) -> dict[str, Any]:
    card, settings = _mapping(record.run.get("card")), record.settings
    repo_id = repo_id or _string(settings.get("hub_model_id")) or _output_dir(settings) or record.name
    before = {
        key.removeprefix("eval_"): value
        for key, value in _mapping(record.results.get("before training")).items()
        if isinstance(value, int | float)
    }
    runs = [record.summary(), *record.twins]
    hardware = record.hardware
    accelerators = [str(device.get("name")) for device in hardware.get("accelerators", [])]
    places = accelerators or [
        f"{hardware.get('processor', 'a processor')}, CPU threads: {hardware.get('threads', '?')}"
    ]
    return {
        "record": record,
        "runs": runs,
        "before": before,
        "metric_names": list(runs[0]["metrics"]),
        "pictures": pictures,
        "usage": usage_code(record, repo_id, _task(record), subfolder=subfolder),
        "commands": list(dict.fromkeys(_command(session) for session in record.run.get("sessions", []))),
        "settings": _shown_settings(settings),
        "options": [
            (key, value)
            for key, value in record.optimizer.get("options", {}).items()
            if value is not None and key != "differentiable"
        ],
        "versions": [(_package(package), version) for package, version in record.versions.items()],
        "description": _string(card.get("description")) or f"The model of the run {record.name}.",
        "limits": _string(card.get("limits")) or _DEFAULT_LIMITS,
        "adapter": _mapping(record.model.get("adapter")),
        "base_model": base_model(record),
        "is_sai": _is_sai(record),
        "optimizer_name": record.optimizer.get("name", "an unknown optimizer"),
        "optimizer_class": record.optimizer.get("class", record.optimizer.get("name", "unknown")),
        "evaluated_on": ", ".join(source["name"] for source in _evaluation_data(record))
        or "data that the record does not name",
        "hardware": ", ".join(places),
        "processes": hardware.get("processes", 1),
        "images": [image for image in record.images[:MAX_SAMPLES] if _OWN_IMAGE.fullmatch(image["file"])],
        "samples": [_shown_sample(sample) for sample in record.samples[:MAX_SAMPLES]],
    }


def _command(session: dict[str, Any]) -> str:
    """The command of a session; a notebook's kernel is started by none that anybody would repeat."""
    return "# in a notebook" if "ipykernel_launcher" in session["command"] else session["command"]


def _on_the_hub(names: Any) -> list[str] | None:
    found = [name for name in ([names] if isinstance(names, str) else _strings(names)) if is_hub_id(name)]
    return found or None


def _shown_sample(sample: dict[str, Any]) -> dict[str, str | None]:
    """Title, text, and what a chat model was asked; other texts begin with their prompt."""
    messages = sample.get("messages")
    last = _mapping(messages[-1]) if isinstance(messages, list) and messages else {}
    return {"title": sample["title"], "text": sample["text"], "prompt": _string(last.get("content"))}


def _shown_settings(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Of Trainer's arguments those that matter and are on; of other loops' all that are plain values."""
    if "per_device_train_batch_size" not in settings:
        return [
            (key, value) for key, value in settings.items() if not (value is None or isinstance(value, dict | list))
        ]
    steps = settings.get("max_steps")
    left_out = "num_train_epochs" if isinstance(steps, int) and steps > 0 else "max_steps"
    return [
        (key, settings[key])
        for key in _SETTINGS
        if key in settings and key != left_out and (settings[key] or key == "seed")
    ]


def _card(data: CardData, text: str) -> Card:
    return Card(data, f"\n{text.lstrip()}")


def _is_sai(record: RunRecord) -> bool:
    return "SGDSaI" in str(record.optimizer.get("name"))


def _task(record: RunRecord) -> str | None:
    described = f"{record.model.get('base_class') or record.model.get('class')}"
    return next((task for ending, task in _TASKS.items() if described.endswith(ending)), None)


def base_model(record: RunRecord) -> str | None:
    """The base model's name on the Hub; a local path is nobody else's business."""
    name = _mapping(record.run.get("card")).get("base_model") or record.model.get("base_model")
    return name if is_hub_id(name) else None


def _output_dir(settings: Mapping[str, Any]) -> str | None:
    """Where the run lies, as seen from where it was started; a path of this machine is nobody else's business."""
    folder = _string(settings.get("output_dir"))
    return None if folder is None or folder.startswith(("/", "~")) or ":" in folder else folder


def _package(name: str) -> str:
    # PEFT looks for its own line under this heading, spelled like this, and adds one if there is none.
    return {"peft": "PEFT", "torch": "Pytorch", "trl": "TRL"}.get(name, name.capitalize() if name != "hf-sai" else name)


def _one_line(value: Any) -> Any:
    if isinstance(value, list):
        return [_one_line(item) for item in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

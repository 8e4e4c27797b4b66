"""Builds a model's structure without its weights: from a directory, a name on the Hub, or a size that is known here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sai.memory.quantised import as_saved, in_4bit

__all__ = ["KNOWN_SIZES", "build_skeleton", "parse_lora"]

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024}
_LLAMA2 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
_VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 224, "num_labels": 1000}

#: Sizes that need no file and no network, written as their published configurations have them.
KNOWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-2-7b": {
        **_LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-2-13b": {
        **_LLAMA2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "vit-h-14": {
        **_VIT,
        "patch_size": 14,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    },
}


def build_skeleton(
    name: str,
    *,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    lora: Mapping[str, Any] | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Returns a model, on the meta device where possible: its structure without its weights.

    Args:
        name: The directory of a model (transformers or diffusers) or a PEFT adapter, a key of ``KNOWN_SIZES``, or a
            name on the Hub. Only configurations are read.
        base_model: An adapter's base model, if it is not where the adapter says.
        dtype: Of the base model's weights. Default: what its configuration says, else float32. PEFT keeps adapters
            on 16-bit weights in float32.
        lora: Keyword arguments of ``peft.LoraConfig``, to add an adapter to a model without one.
        load_in_4bit: Make the linear layers those that bitsandbytes quantises to 4 bits (QLoRA), all but the output
            layer, as transformers does. A model that is saved quantised is built so by itself.
        trust_remote_code: Run the code that the model's repository brings along, where it does.

    Raises:
        ValueError: The directory holds no model, its configuration is damaged, the architecture is unknown, or the
            options do not go together.
        OSError: The model, or the adapter's base model, cannot be found.

    Example:
        >>> model = build_skeleton("gpt2-xl")
        >>> sum(p.numel() for p in model.parameters())
        1557611200
    """
    try:
        return _build(name, base_model, lora, _Options(dtype, load_in_4bit, trust_remote_code))
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # a configuration can be wrong in any way, and transformers and PEFT say so in any way
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the configuration of {name} cannot be used ({reason})") from error


@dataclass(frozen=True)
class _Options:
    """How the base is built, whoever asks for it."""

    dtype: torch.dtype | None
    load_in_4bit: bool
    trust_remote_code: bool


def _build(name: str, base_model: str | None, lora: Mapping[str, Any] | None, options: _Options) -> Any:
    directory, adapter_name = Path(name), "default"
    if directory.is_dir() and not any((directory / file).is_file() for file in ("adapter_config.json", "config.json")):
        # PEFT saves an adapter that has a name of its own in a folder of that name.
        named = sorted(file.parent for file in directory.glob("*/adapter_config.json"))
        if len(named) > 1:
            raise ValueError(f"{name} holds {len(named)} adapters; give the directory of one, such as {named[0]}")
        if named:
            directory, adapter_name = named[0], named[0].name
    if not directory.is_dir():
        is_adapter = name not in KNOWN_SIZES and _is_adapter_on_hub(name)
    elif not any((directory / file).is_file() for file in ("adapter_config.json", "config.json")):
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{name} holds neither adapter_config.json nor config.json, but {found}; "
            "give the directory of a model, an adapter or a Trainer checkpoint"
        )
    else:
        is_adapter = (directory / "adapter_config.json").is_file()

    if is_adapter:
        if lora is not None:
            raise ValueError(f"{name} is an adapter already, so lora cannot add another; give its base model's name")
        return _build_adapter(name if not directory.is_dir() else str(directory), base_model, options, adapter_name)
    if base_model is not None:
        raise ValueError(f"{name} is no adapter, so it has no base model; leave out base_model ({base_model})")
    try:
        with torch.device("meta"):
            model = _build_base(name, None, options)
            return model if lora is None else _add_lora(model, lora)
    except OSError as error:
        raise OSError(f"{name} is no directory here, and no model of that name can be read ({error})") from error


def parse_lora(text: str) -> dict[str, Any]:
    """Reads ``--lora``: keyword arguments of ``peft.LoraConfig`` from ``r=16,targets=q_proj;v_proj``.

    Args:
        text: ``r`` (the rank), ``targets`` (modules, or ``all-linear``; default: PEFT's for the architecture) and
            ``save`` (modules trained in full), joined by commas, with lists joined by semicolons.

    Raises:
        ValueError: A key that is unknown, repeated or without a value, or a rank that is no whole number above 0.

    Example:
        >>> parse_lora("r=16,targets=q_proj;v_proj")
        {'r': 16, 'target_modules': ['q_proj', 'v_proj']}
    """
    options: dict[str, Any] = {}
    keys = {"r": "r", "targets": "target_modules", "save": "modules_to_save"}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in keys or not value or keys[key] in options:
            raise ValueError(
                f"lora: {item.strip()!r} in {text!r} is unknown, repeated or without a value; "
                f"write each of {', '.join(keys)} at most once, as in r=16,targets=q_proj;v_proj"
            )
        if key == "r" and not (value.isascii() and value.isdigit() and len(value) <= 7 and int(value) > 0):
            raise ValueError(f"lora: r must be a whole number above 0 and below 10,000,000, but is {value[:20]!r}")
        names = [part.strip() for part in value.split(";")]
        options[keys[key]] = int(value) if key == "r" else "all-linear" if names == ["all-linear"] else names
    return options


def _is_adapter_on_hub(name: str) -> bool:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except OSError as error:
        raise OSError(f"{name} is no directory here, and no model of that name can be read ({error})") from error


def _build_adapter(path: str, base_model: str | None, options: _Options, adapter_name: str) -> Any:
    import peft

    config = peft.PeftConfig.from_pretrained(path)
    config.inference_mode = False  # saved adapters say True, which would freeze this one
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # PiSSA and the like decompose the base's weights, and here are none
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{path} does not say which base model it is for; name it with --base-model")
    try:
        with torch.device("meta"):
            return peft.get_peft_model(_build_base(name, config.task_type, options), config, adapter_name)
    except OSError as error:
        raise OSError(f"the base model {name} of {path} cannot be read; name it with --base-model ({error})") from error
    except RuntimeError:
        if options.load_in_4bit:
            raise ValueError(f"load_in_4bit: {config.peft_type.value} of {path} computes with the weights") from None
        # A few tuners (AdaMSS, BOFT, FRoD, SHiRA, UniLoRA) compute with the base's weights: any will do here.
        return peft.get_peft_model(_build_base(name, config.task_type, options), config, adapter_name)


def _add_lora(model: Any, lora: Mapping[str, Any]) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**lora))


def _build_base(name: str, task_type: Any, options: _Options) -> Any:
    config_file = Path(name) / "config.json"
    written = _read_json(config_file) if config_file.is_file() else {}
    if diffusers_class := written.get("_class_name"):
        import diffusers

        if not hasattr(diffusers, str(diffusers_class)):
            raise ValueError(f"the configuration of {name} names the diffusers class {diffusers_class}, unknown here")
        model_class = getattr(diffusers, diffusers_class)
        model = model_class.from_config(model_class.load_config(name))
    else:
        model = _build_transformer(name, task_type, options.trust_remote_code)
    if options.dtype is not None:
        model.to(options.dtype)
    saved = getattr(model.config, "quantization_config", None) if hasattr(model, "config") else None
    if saved:
        return as_saved(model, dict(saved), name, options.load_in_4bit)
    return in_4bit(model, name) if options.load_in_4bit else model


def _read_json(file: Path) -> dict[str, Any]:
    """A configuration file's content; its errors are ValueErrors that name the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings by name, but a {type(content).__name__}")
    return content


def _build_transformer(name: str, task_type: Any, trust_remote_code: bool) -> Any:
    import transformers

    if name in KNOWN_SIZES and not Path(name).is_dir():
        config = transformers.AutoConfig.for_model(**KNOWN_SIZES[name])
    else:
        config = _read_config(name, trust_remote_code)
    own = getattr(config, "auto_map", None) or {}
    if task_type in _AUTO_CLASSES:
        auto_class = _AUTO_CLASSES[task_type]
    else:
        architecture = str((config.architectures or ["none"])[0])
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)._from_config(config)
        auto_class = next((key for key in own if key.startswith("AutoModel")), "")
        if not auto_class:
            raise ValueError(f"the configuration of {name} names the architecture {architecture}, unknown here")
    if auto_class in own and not trust_remote_code:
        raise ValueError(_UNTRUSTED.format(name=name))
    return getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code)


#: Each layer is built, and no model has so many.
_MOST_LAYERS = 100_000

_UNTRUSTED = (
    "{name} brings code of its own, which this command runs only with --trust-remote-code: read that code first, since "
    "it can do whatever you can"
)


def _read_config(name: str, trust_remote_code: bool) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(_UNTRUSTED.format(name=name)) from None
        raise ValueError(f"the configuration of {name} cannot be used ({error})") from error
    for key, value in vars(config).items():
        if "layers" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"the configuration of {name} gives {key} as {str(value)[:40]}; it is damaged")
    return config

"""``hf-sai groups``: the parameter groups of a model, an adapter or a checkpoint, without loading its weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from hf_sai.group_report import describe_groups, group_table
from hf_sai.groups import param_groups
from hf_sai.gsnr import UNMEASURED, GSNRRow

__all__ = ["add_parser"]

# What Trainer calls the optimizer's state in a checkpoint directory.
_OPTIMIZER_FILE = "optimizer.pt"

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def add_parser(subparsers: Any) -> None:
    """Adds ``groups`` to the ``hf-sai`` command."""
    parser = subparsers.add_parser(
        "groups",
        help="show the parameter groups of a model, an adapter or a checkpoint",
        description="Show into which groups SGD-SaI sorts the trainable parameters, and, for a checkpoint directory "
        f"with an {_OPTIMIZER_FILE}, the g-SNR measured for them. Only configurations are read, no weights.",
    )
    parser.add_argument("path", help="a model's or adapter's directory or name, or a Trainer checkpoint directory")
    parser.add_argument("--base-model", help="the adapter's base model, if it is not where the adapter says")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> str:
    """Returns the table of the groups of ``args.path``.

    Raises:
        ValueError: The directory holds no model, adapter or checkpoint, or an optimizer that is not SGD-SaI's.
        OSError: The model, or the adapter's base model, cannot be found.
    """
    optimizer_file = Path(args.path) / _OPTIMIZER_FILE
    if optimizer_file.is_file():
        return _table_of_checkpoint(optimizer_file, args)
    # The table says whether a group decays; any value above 0 will do.
    return describe_groups(param_groups(_build(args.path, args.base_model), lr=1.0, weight_decay=1.0))


def _table_of_checkpoint(file: Path, args: argparse.Namespace) -> str:
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    groups, state = saved["param_groups"], saved["state"]
    if not any("gsnr" in entry for entry in state.values()):
        raise ValueError(f"{file} holds no g-SNR: it is not the state of an SGD-SaI optimizer that took a step")
    if not all("param_names" in group for group in groups):
        raise ValueError(
            f"{file} holds no parameter names, so its g-SNR cannot be told apart; build the optimizer from named "
            "parameters (hf_sai.create_sgd_sai_optimizer, or SGDSaI(model.named_parameters()))"
        )
    shapes = {
        name: tuple(state[index]["momentum_buffer"].shape)
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
        if "momentum_buffer" in state.get(index, {})
    }
    if any(name not in shapes for group in groups for name in group["param_names"]):
        shapes |= {name: tuple(p.shape) for name, p in _build(args.path, args.base_model).named_parameters()}
    rows = []
    for number, group in enumerate(groups):
        for index, name in zip(group["params"], group["param_names"], strict=True):
            gsnr = float(state.get(index, {}).get("gsnr", UNMEASURED)) or None
            ratio = gsnr / math.sqrt(math.prod(shapes[name])) if gsnr else None
            rows.append(GSNRRow(name, str(group.get("name", number)), shapes[name], gsnr, ratio))
    return group_table(groups, rows, trained=True)


def _build(path: str, base_model: str | None) -> Any:
    """The model of a directory or name, on the meta device where possible: its structure without its weights."""
    directory = Path(path)
    if not directory.is_dir():
        return _build_from_hub(path, base_model)
    if not any((directory / name).is_file() for name in ("adapter_config.json", "config.json")):
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{path} holds neither adapter_config.json nor config.json nor {_OPTIMIZER_FILE}, but {found}; "
            "give the directory of a model, an adapter or a Trainer checkpoint"
        )
    if (directory / "adapter_config.json").is_file():
        return _build_adapter(path, base_model)
    with torch.device("meta"):
        return _build_base(path)


def _build_from_hub(name: str, base_model: str | None) -> Any:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is not None:
            return _build_adapter(name, base_model)
        with torch.device("meta"):
            return _build_base(name)
    except OSError as error:
        raise OSError(f"{name} is no directory here, and no model of that name can be read ({error})") from error


def _build_adapter(path: str, base_model: str | None) -> Any:
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
            return peft.get_peft_model(_build_base(name, config.task_type), config)
    except OSError as error:
        raise OSError(f"the base model {name} of {path} cannot be read; name it with --base-model ({error})") from error
    except RuntimeError:
        # A few tuners (AdaMSS, BOFT, FRoD, SHiRA, UniLoRA) compute with the base's weights: any will do here.
        return peft.get_peft_model(_build_base(name, config.task_type), config)


def _build_base(name: str, task_type: str | None = None) -> Any:
    config_file = Path(name) / "config.json"
    diffusers_class = json.loads(config_file.read_text()).get("_class_name") if config_file.is_file() else None
    if diffusers_class:
        import diffusers

        model_class = getattr(diffusers, diffusers_class)
        return model_class.from_config(model_class.load_config(name))
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    if task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task_type]).from_config(config)
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise ValueError(f"the configuration of {name} names the architecture {architecture}, unknown here")
    return getattr(transformers, architecture)._from_config(config)

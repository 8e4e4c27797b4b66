"""Pretrain GPT-2 with any optimizer that Trainer knows, `sgd_sai` among them.

On real text that needs no network (the standard library's documentation), 2 CPU cores, about 2 minutes:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml

Every key of the YAML file can be set on the command line, which wins:

    accelerate launch recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml \\
        --optim adamw_torch_fused --learning_rate 4e-3 --output_dir runs/another_optimizer

Your own text files, or a data set of the Hub, streamed:

    accelerate launch recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml \\
        --train_file first.txt second.txt --validation_file held_out.txt
    accelerate launch recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/gpt2_small.yaml \\
        --dataset_name Skylion007/openwebtext --streaming true

Go on after an interruption:

    accelerate launch recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml \\
        --resume_from_checkpoint true
"""

import sys
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import evaluate
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.publish import PublishError
from hf_sai.runs.files import atomic_write
from hf_sai.trainer.callbacks import RunRecordCallback
from hf_sai.trainer.hub_callback import take_over_push_to_hub
from recipes.common.recipe_input import (
    OPTIMIZER_SETTINGS,
    InputError,
    check_optimizer,
    delete_checkpoints,
    find_checkpoint,
    first_line,
    option,
    parse_config_and_flags,
)
from recipes.common.result_files import write_json
from recipes.common.stdlib_corpus import load_documents

METRIC = Path(__file__).parents[1] / "metrics" / "token_nll" / "token_nll.py"
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_DOCUMENTS = 100_000
SHUFFLE_BUFFER = 10_000
FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
DTYPES = ("float32", "bfloat16")
MODEL_SIZES = {  # layers, width, heads; all but tiny are OpenAI's
    "tiny": (4, 128, 4),
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}


@dataclass
class ScriptArguments:
    """Data, tokenizer and model; without a data set and files, the standard library's documentation is the text."""

    dataset_name: str | None = option(None, "Data set on the Hub, or a local folder.")
    dataset_config_name: str | None = option(None, "Its configuration, if it has several.")
    train_file: list[str] | None = field(default=None, metadata={"help": f"Local files: {', '.join(FORMATS)}."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Local files of the same kind."})
    text_column: str = option("text", "Column that holds the text.")
    sample_by: str = option("paragraph", "One document of a .txt or .md file: line, paragraph or document.")
    streaming: bool = option(False, "Read while training; --max_steps is then needed.")
    validation_documents: int = option(
        1000, "Held out where no validation text is given: the first documents, at most a tenth."
    )
    tokenizer_name: str | None = option(
        None, "Tokenizer to load, e.g. gpt2. Default: the model's; else one is trained on the text."
    )
    vocab_size: int = option(2048, "Entries of a tokenizer trained on the text (byte-level BPE).")
    model_name_or_path: str | None = option(None, "Checkpoint to go on from.")
    model_size: str = option("tiny", f"Size of a new model: {', '.join(MODEL_SIZES)}.")
    dtype: str = option(
        DTYPES[0], f"Of the weights: {' or '.join(DTYPES)}, the latter with --optim_args stochastic_rounding=true."
    )
    block_size: int = option(128, "Tokens of one training sequence; the context of a new model.")
    dropout: float = option(0.0, "Dropout of a new model.")
    sample_prompt: str = option("Return the", "Start of the text written at the end.")
    sample_tokens: int = option(100, "Tokens to write at the end; 0: none.")
    restart: bool = option(False, "Delete the checkpoints of an earlier run in output_dir.")


def main(argv: list[str] | None = None) -> dict:
    # Everything that can be wrong with the input comes before Trainer, which creates the output directory.
    script_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    checkpoint = find_checkpoint(training_args, script_args.restart)
    with training_args.main_process_first(desc="preparing the data"):
        documents = load_text(script_args)
        tokenizer = load_tokenizer(script_args, documents["train"])
        train_dataset = to_blocks(documents["train"], "training", script_args, tokenizer)
        if script_args.streaming:
            train_dataset = train_dataset.shuffle(seed=training_args.seed, buffer_size=SHUFFLE_BUFFER)
        validation_dataset = to_blocks(documents["validation"], "validation", script_args, tokenizer)
    set_seed(training_args.seed)
    model = load_model(script_args, tokenizer).to(getattr(torch, script_args.dtype))
    check_optimizer(training_args, model)

    publisher = take_over_push_to_hub(training_args)
    if script_args.restart and checkpoint is None:
        delete_checkpoints(training_args)
    metric = evaluate.load(str(METRIC))
    record = RunRecordCallback(
        data=[{**describe_data(script_args), "role": "train and validation"}],
        card=describe_model(script_args),
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[record, publisher] if publisher else [record],
        preprocess_logits_for_metrics=nll_and_tokens,
        compute_metrics=lambda output: metric.compute(
            predictions=output.predictions[:, 0], references=output.predictions[:, 1].astype(int)
        ),
    )
    train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics = train_metrics | trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_results(trainer, record, metrics, script_args)
    if publisher:
        publisher.finish()
    return metrics


def parse_arguments(argv: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    usage = "train.py CONFIG.yaml [--key value ...]"
    script_args, training_args = parse_config_and_flags((ScriptArguments, TrainingArguments), argv, usage)
    if script_args.model_size not in MODEL_SIZES:
        raise InputError(f"model_size is {script_args.model_size!r}; choose one of {', '.join(MODEL_SIZES)}.")
    if script_args.dtype not in DTYPES:
        raise InputError(f"dtype is {script_args.dtype!r}; choose one of {', '.join(DTYPES)}.")
    if script_args.block_size < 2:
        raise InputError(f"block_size is {script_args.block_size}; it must be at least 2 tokens.")
    if script_args.streaming and training_args.max_steps <= 0:
        raise InputError("streaming needs --max_steps, since the length of a stream is not known.")
    return script_args, training_args


def load_text(script_args: ScriptArguments) -> DatasetDict | dict:
    """Return documents under "train" and "validation"."""
    if script_args.dataset_name is None and script_args.train_file is None:
        return load_documents()
    wanted = describe_data(script_args)["name"]
    if script_args.dataset_name is not None:
        arguments = {"path": script_args.dataset_name, "name": script_args.dataset_config_name}
    else:
        arguments = local_files(script_args)
    try:
        splits = load_dataset(**arguments, streaming=script_args.streaming)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {wanted}: {first_line(error)}") from error
    if "train" not in splits:
        raise InputError(f"{wanted} has no split named train; it has {', '.join(splits)}.")
    columns = splits["train"].column_names or list(next(iter(splits["train"]), {}))
    if columns and script_args.text_column not in columns:
        raise InputError(
            f"{wanted} has no column {script_args.text_column!r}; name one of {', '.join(columns)} as --text_column."
        )
    train, count = splits["train"], script_args.validation_documents
    if "validation" in splits:
        validation = splits["validation"]
    elif script_args.streaming:
        train, validation = train.skip(count), train.take(count)
    elif len(train) < 2:
        raise InputError(
            f"{wanted} is one document or none (--sample_by {script_args.sample_by}); none can be held out."
        )
    else:
        count = min(count, max(1, len(train) // 10))
        train, validation = train.select(range(count, len(train))), train.select(range(count))
    if script_args.streaming:  # read it once, so that every evaluation sees the same text
        validation = Dataset.from_list(list(islice(validation, count)))
    return {"train": train, "validation": validation}


def describe_data(script_args: ScriptArguments) -> dict:
    if script_args.dataset_name is None and script_args.train_file is None:
        return {"name": "Python standard library: documentation and docstrings", "license": "psf-2.0"}
    if script_args.dataset_name is None:
        return {"name": ", ".join(script_args.train_file)}
    on_the_hub = not Path(script_args.dataset_name).exists()
    return {"name": script_args.dataset_name} | ({"id": script_args.dataset_name} if on_the_hub else {})


def describe_model(script_args: ScriptArguments) -> dict:
    """Return what the model card should say and only we know; people with other data should add their licence."""
    what = f"GPT-2 ({script_args.model_size})" if script_args.model_name_or_path is None else "A language model"
    card = {
        "description": f"{what} that continues text like its training data. Made to compare optimizers.",
        "limits": "It writes text that looks like its training data and knows no facts; nobody checked what it writes "
        "for truth, bias or offence. Its loss is comparable only between runs with the same tokenizer and data.",
    }
    if script_args.dataset_name is None and script_args.train_file is None:
        link = "https://docs.python.org/3/license.html"
        card |= {"language": "en", "license": "other", "license_name": "psf-2.0", "license_link": link}
    return card


def local_files(script_args: ScriptArguments) -> dict:
    """Return the arguments with which `load_dataset` reads --train_file and --validation_file."""
    files = {"train": script_args.train_file, "validation": script_args.validation_file or []}
    names = [name for group in files.values() for name in group]
    for name in names:
        if not Path(name).is_file():
            raise InputError(f"there is no file {name}.")
        if Path(name).stat().st_size == 0:
            raise InputError(f"the file {name} is empty.")
    formats = {FORMATS.get(Path(name).suffix.lower()) for name in names}
    if len(formats) > 1 or None in formats:
        raise InputError(f"{', '.join(names)}: the files must be of one kind, and end in one of {', '.join(FORMATS)}.")
    options = {"path": formats.pop(), "data_files": {split: group for split, group in files.items() if group}}
    if options["path"] == "text":
        options["sample_by"] = script_args.sample_by
    return options


def load_tokenizer(script_args: ScriptArguments, documents: Dataset | IterableDataset) -> PreTrainedTokenizerFast:
    """Load the tokenizer that is asked for, or train a byte-level BPE on the training text."""
    name = script_args.tokenizer_name or script_args.model_name_or_path
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the tokenizer {name}: {first_line(error)}") from error
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if script_args.vocab_size <= len(alphabet):
        raise InputError(f"vocab_size is {script_args.vocab_size}; it must be above {len(alphabet)}, the bytes.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=script_args.vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet
    )
    texts = (row[script_args.text_column] or "" for row in islice(documents, TOKENIZER_DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def to_blocks(
    documents: Dataset | IterableDataset, use: str, script_args: ScriptArguments, tokenizer: PreTrainedTokenizerFast
) -> Dataset | IterableDataset:
    """Join the documents, an end token after each, and cut them into sequences of `block_size` tokens."""
    column, size = script_args.text_column, script_args.block_size
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token; choose another.")

    def cut(batch: dict) -> dict:
        texts = [text for text in batch[column] if text and text.strip()]
        # The length warning is about the model's context; the texts are cut right here.
        encoded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded))
        blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    options = {} if isinstance(documents, IterableDataset) else {"desc": f"tokenizing the {use} text"}
    columns = documents.column_names or list(next(iter(documents), {}))
    blocks = documents.map(cut, batched=True, remove_columns=columns, **options)
    if next(iter(blocks), None) is None:
        raise InputError(
            f"the {use} text is empty or shorter than one block of {size} tokens; give more text, a smaller "
            "--block_size, or, where the first documents are held out, fewer --validation_documents."
        )
    return blocks


def load_model(script_args: ScriptArguments, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Load the checkpoint that is asked for, or make a new GPT-2 of the given size."""
    if name := script_args.model_name_or_path:
        try:
            model = AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the model {name}: {first_line(error)}") from error
        longest = getattr(model.config, "max_position_embeddings", script_args.block_size)
        if script_args.block_size > longest:
            raise InputError(f"block_size is {script_args.block_size}, but {name} takes at most {longest} tokens.")
        return model
    layers, width, heads = MODEL_SIZES[script_args.model_size]
    dropout = script_args.dropout
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=script_args.block_size,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def nll_and_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits (batch, length, vocabulary) to each sequence's negative log-likelihood and token count."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return torch.stack([losses.view_as(targets).sum(1), (targets != -100).sum(1).float()], dim=1)


def save_results(trainer: Trainer, record: RunRecordCallback, metrics: dict, script_args: ScriptArguments) -> None:
    """Save results.json, a text sample, the run record, pictures and the model card; say where they are."""
    folder = Path(trainer.args.output_dir)
    settings = trainer.args.to_dict()
    checkpoint = folder / f"checkpoint-{trainer.state.global_step}"
    results = {
        "metrics": metrics,
        "optimizer": {key: settings[key] for key in OPTIMIZER_SETTINGS},
        "parameters": trainer.model.num_parameters(),
        "checkpoint": checkpoint.name if checkpoint.is_dir() else None,
    }
    write_json(folder / "results.json", results)
    record.add(results={key: metrics[key] for key in ("eval_loss", "eval_perplexity")})
    print(f"\neval loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}")
    if script_args.sample_tokens > 0 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        sample = write_sample(trainer, script_args)
        atomic_write(folder / "sample.txt", sample + "\n")
        prompt = script_args.sample_prompt
        record.add(samples=[{"title": "Text written after training", "prompt": prompt, "text": sample}])
        print(f"sample: {sample}")
    *pictures, card = finish_run(folder)
    print(f"\nmodel: {folder}\nmodel card: {card}\nnumbers: {folder / 'results.json'}")
    print(f"pictures: {', '.join(map(str, pictures))}")


def write_sample(trainer: Trainer, script_args: ScriptArguments) -> str:
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    prompt = tokenizer(script_args.sample_prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    room = model.config.max_position_embeddings - prompt["input_ids"].shape[1]
    set_seed(trainer.args.seed)
    output = model.generate(
        **prompt,
        max_new_tokens=max(1, min(script_args.sample_tokens, room)),
        do_sample=True,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, PublishError) as problem:
        sys.exit(f"train.py: {problem}")

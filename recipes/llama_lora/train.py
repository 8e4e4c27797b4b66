"""Teach a Llama-architecture model with LoRA, with any optimizer that Trainer knows, `sgd_sai` among them.

A real model and real text that need no network (SmolLM2-135M-Instruct learns to write the standard library's
docstrings), 2 CPU cores, about 15 minutes:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/llama_lora/train.py recipes/llama_lora/demo.yaml

Every key of the YAML file can be set on the command line, which wins:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml \\
        recipes/llama_lora/train.py recipes/llama_lora/demo.yaml \\
        --lora_r 16 --optim_args lr_ratios=lora_A:2 --output_dir runs/another_adapter

Another model, other data (a chat in `messages`, or `prompt` and `completion`), on a GPU, the base in 4 bit:

    accelerate launch --config_file recipes/accelerate_configs/one_gpu.yaml \\
        recipes/llama_lora/train.py recipes/llama_lora/llama_3_8b.yaml \\
        --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name my_chats.jsonl --load_in_4bit true

TRL's SFTTrainer does the training and not transformers' Trainer: it writes chats with the model's own template, leaves
the prompt out of the loss, keeps an 8-bit or 4-bit base and its adapter in the right types, and still is a Trainer, so
that `--optim sgd_sai` works as everywhere.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

from base_model import add_lora, load_base, name_base
from datasets import Dataset, DatasetDict
from instruction_data import load_splits, shorten
from scoring import generate, references, score, side_by_side
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.publish import PublishError
from hf_sai.runs.files import atomic_write
from hf_sai.trainer.callbacks import RunRecordCallback
from hf_sai.trainer.hub_callback import take_over_push_to_hub
from recipes.common.comparison import markdown_table
from recipes.common.recipe_input import (
    InputError,
    check_optimizer,
    delete_checkpoints,
    find_checkpoint,
    parse_config_and_flags,
)
from recipes.common.result_files import write_json

DOCSTRINGS = {"name": "Python standard library: code and docstrings", "license": "psf-2.0"}


@dataclass
class RecipeArguments:
    """The data and what to do beside training; without a data set, the standard library's docstrings are learned."""

    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file: in the model's folder, or on its own."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, local folder, or .json, .jsonl, .csv, .parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if it exists."})
    held_out_rows: int = field(default=200, metadata={"help": "Rows of training to evaluate on if it does not."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many rows at most."})
    generations: int = field(default=32, metadata={"help": "Completions to write and score before and after; 0: none."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest completion, in tokens."})
    shown_generations: int = field(default=4, metadata={"help": "How many of them to print."})
    restart: bool = field(default=False, metadata={"help": "Delete the checkpoints of an earlier run in output_dir."})


def main(argv: list[str] | None = None) -> dict:
    # Everything that can be wrong with the input comes before the trainer, which creates the output directory.
    args, model_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    checkpoint = find_checkpoint(training_args, args.restart)
    set_seed(training_args.seed)
    base, tokenizer = load_base(model_args, args.gguf_file)
    with training_args.main_process_first(desc="preparing the data"):
        splits = load_data(args, training_args, tokenizer)
    model = add_lora(base, model_args)
    check_optimizer(training_args, model)

    publisher = take_over_push_to_hub(training_args)
    if args.restart and checkpoint is None:
        delete_checkpoints(training_args)
    record = RunRecordCallback(data=[describe_data(args)], card=describe_adapter(args, model_args))
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        callbacks=[record, publisher] if publisher else [record],
    )
    validation = splits["validation"]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # Trainer cannot evaluate before it trains then
        before, written_before = {}, []
    else:
        before, written_before = assess(trainer, validation, args, "before")
        prepare_again(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    after, written_after = assess(trainer, validation, args, "after")
    results = {"before": before, "after": after}
    trainer.save_model()
    if trainer.is_world_process_zero():
        name_base(trainer.accelerator.unwrap_model(trainer.model), training_args.output_dir)
        if args.dataset_name is None:  # rows of other people's data do not belong into a card that may be published
            record.add(samples=samples(validation, written_after[: args.shown_generations]))
        save_results(trainer, record, results, side_by_side(validation, written_before, written_after))
        print(side_by_side(validation, written_before[: args.shown_generations], written_after))
        print(results_table(results))
    if publisher:
        publisher.finish()
    return results


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, ModelConfig, SFTConfig]:
    args, model_args, training_args = parse_config_and_flags(
        (RecipeArguments, ModelConfig, SFTConfig), argv, usage="train.py CONFIG.yaml [--key value ...]"
    )
    for name, least in (
        ("held_out_rows", 1),
        ("max_train_samples", 1),
        ("max_eval_samples", 1),
        ("generations", 0),
        ("max_new_tokens", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}.")
    return args, model_args, training_args


def load_data(args: RecipeArguments, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Return training and validation rows that fit into `max_length` tokens."""
    splits = load_splits(
        args.dataset_name, args.dataset_config, args.dataset_train_split, args.dataset_test_split, args.held_out_rows
    )
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    length = training_args.max_length
    return DatasetDict({name: shorten(rows, tokenizer, length, limits[name]) for name, rows in splits.items()})


def describe_data(args: RecipeArguments) -> dict:
    """Return what the record says of the data; rows of it are held out to evaluate on."""
    role = {"role": "train and validation"}
    if args.dataset_name is None:
        return {**DOCSTRINGS, **role}
    on_the_hub = not Path(args.dataset_name).exists()
    return {"name": args.dataset_name, **role} | ({"id": args.dataset_name} if on_the_hub else {})


def describe_adapter(args: RecipeArguments, model_args: ModelConfig) -> dict:
    """Return what the model card should say and only we know; people with their own data should add its licence."""
    limits = "Nobody checked what it writes for truth, bias or offence."
    if args.dataset_name is not None or model_args.model_name_or_path is not None or args.gguf_file is not None:
        return {"description": "An adapter that answers like its training data.", "limits": limits}
    return {
        "description": "Writes the docstring of a short Python function. Made to compare optimizers.",
        "limits": f"A small model after a few minutes of training: its docstrings are often wrong. {limits}",
        "language": "en",
        "license": "apache-2.0",  # the base model's
    }


def assess(
    trainer: SFTTrainer, validation: Dataset, args: RecipeArguments, when: str
) -> tuple[dict[str, float], list[str]]:
    """Return loss per completion token and scores of what the model writes, and the texts."""
    scores = {"eval_loss": trainer.evaluate()["eval_loss"]}
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # no process has the whole model
    count = 0 if sharded else min(args.generations, len(validation))
    texts = []
    if count and trainer.is_world_process_zero():
        rows = validation.select(range(count))
        texts = generate(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            rows,
            max_new_tokens=args.max_new_tokens,
            batch_size=trainer.args.per_device_eval_batch_size,
            desc=f"writing {when} training",
        )
        scores |= score(texts, references(rows), docstrings=args.dataset_name is None)
    return scores, texts


def prepare_again(trainer: SFTTrainer) -> None:
    """Let `train` prepare the model, although `evaluate` has done so for evaluation alone.

    accelerate (1.15) leaves a model as it is that it has marked as prepared. Under DDP nothing would average the
    gradients then, and every process would silently train a model of its own.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)


def save_results(trainer: SFTTrainer, record: RunRecordCallback, results: dict, texts: str) -> None:
    """Save results.json, generations.md, the run record's figures, the pictures and the model card."""
    folder = Path(trainer.args.output_dir)
    write_json(folder / "results.json", results)
    atomic_write(folder / "generations.md", texts)
    record.add(results={**results["after"], "before training": results["before"]})
    *pictures, card = finish_run(folder)
    print(f"\nadapter: {folder}\nmodel card: {card}\nnumbers: {folder / 'results.json'}")
    print(f"texts: {folder / 'generations.md'}\npictures: {', '.join(map(str, pictures))}")


def samples(rows: Dataset, texts: list[str]) -> list[dict]:
    """Return what the record keeps of the completions: the rows' messages, and what was written."""
    pairs = zip(rows, texts, strict=False)
    return [
        {"title": f"Docstring for held-out function {number}", "messages": row["prompt"], "text": text}
        for number, (row, text) in enumerate(pairs, start=1)
    ]


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Return the scores before and after training as a Markdown table; engines that shard leave out the former."""
    before, after = results["before"], results["after"]
    rows = [(key, f"{before[key]:.4f}" if key in before else "", f"{value:.4f}") for key, value in after.items()]
    return markdown_table(["", "before", "after"], rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, PublishError) as problem:
        sys.exit(f"train.py: {problem}")

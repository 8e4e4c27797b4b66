"""Everything that can be set for `train.py`, what of it is refused at once, and how records and cards tell of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

from emoji_data import ATTRIBUTION, LICENSE

from recipes.common.recipe_input import InputError, option, parse_config_and_flags

__all__ = [
    "Arguments",
    "check_arguments",
    "describe_data",
    "describe_model",
    "hub_settings",
    "parse_arguments",
    "plain",
]


HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@dataclass
class Arguments:
    """Everything that can be set; what Trainer has too is called as there."""

    output_dir: str = option("runs/diffusers", "Where everything goes.")
    # The model
    pretrained_model_name_or_path: str | None = option(None, "Checkpoint in Stable Diffusion layout: Hub or folder.")
    revision: str | None = option(None, "Its branch or commit.")
    new_unet: bool = option(False, "Train a UNet from nothing, of the checkpoint's configuration.")
    train: str = option("lora", "lora, or full: all of the UNet.")
    train_text_encoder: bool = option(False, "With lora: adapters on the text encoder, too.")
    lora_r: int = option(4, "Rank.")
    lora_alpha: int = option(4, "Scale; the adapter's output counts lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_k", "to_q", "to_v", "to_out.0"],
        metadata={"help": "Layers of the UNet with an adapter."},
    )
    # The data
    dataset_name: str | None = option(None, "Data set on the Hub, or its folder. Default: the emoji.")
    dataset_config_name: str | None = option(None, "Its configuration, if it has several.")
    train_data_dir: str | None = option(None, "Folder of images with a metadata.jsonl (file_name, text).")
    image_column: str = option("image", "Column of the images.")
    caption_column: str = option("text", "Column of the captions; rows without one are left out.")
    emoji_categories: list[str] | None = field(
        default=None, metadata={"help": "Of the emoji, only these categories: smiley, flag, ..."}
    )
    held_out_rows: int = option(64, "Rows to evaluate on where the data set has no split named validation.")
    max_train_samples: int | None = option(None, "At most so many rows to train on.")
    resolution: int = option(512, "Width and height in pixels; the middle of each image is cut out.")
    resize: bool = option(True, "Bring images of other sizes to the resolution; false: refuse them.")
    empty_captions: float = option(0.0, "Share of captions left out in training, for guidance (0 to 1).")
    # The optimizer
    optim: str = option("sgd_sai", "Any optimizer name of transformers' Trainer.")
    optim_args: str | None = option(None, "Its options, key=value,key=value.")
    optim_target_modules: str | None = option(None, "For GaLore and APOLLO: which layers.")
    learning_rate: float = option(1e-2, "Learning rate; the default is for sgd_sai.")
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    adam_beta1: float = option(0.9, "For the Adam family.")
    adam_beta2: float = option(0.999, "For the Adam family.")
    adam_epsilon: float = option(1e-8, "For the Adam family.")
    lr_scheduler_type: str = option("constant", "Schedule of the learning rate, any of transformers'.")
    warmup_steps: int = option(0, "Steps over which the learning rate rises.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: not at all.")
    # Training
    max_steps: int = option(1000, "Optimizer steps.")
    per_device_train_batch_size: int = option(16, "Images of one forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes of one step.")
    gradient_checkpointing: bool = option(False, "Compute activations again instead of keeping them.")
    mixed_precision: str | None = option(None, "no, fp16 or bf16. Default: what accelerate's configuration says.")
    snr_gamma: float | None = option(None, "Min-SNR weighting of timesteps; 5 is usual. Default: none.")
    use_ema: bool = option(False, "Evaluate and save a moving average of the weights.")
    ema_decay: float = option(0.9999, "Its decay; shorter in the first steps.")
    seed: int = option(0, "Random seed of everything.")
    use_cpu: bool = option(False, "Train on the CPU.")
    # Evaluating, logging, saving
    eval_steps: int = option(0, "Evaluate and draw every so many steps; 0: only before and after.")
    per_device_eval_batch_size: int = option(32, "Images of one forward pass.")
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Images to draw before, in and after training."}
    )
    num_inference_steps: int = option(25, "Steps of drawing an image.")
    guidance_scale: float = option(7.5, "How far to follow the prompt; 1: no guidance.")
    logging_steps: int = option(10, "Log every so many steps.")
    report_to: str = option("none", "Trackers of Accelerate: tensorboard, wandb, all, none, ...")
    save_steps: int = option(0, "Save a checkpoint every so many steps; 0: never.")
    save_total_limit: int | None = option(None, "Keep only so many of the newest checkpoints.")
    resume_from_checkpoint: str | None = option(None, "true: go on from the newest checkpoint; or its folder.")
    restart: bool = option(False, "Delete the checkpoints of an earlier run in output_dir.")
    disable_tqdm: bool = option(False, "No progress bars.")
    # Publishing
    push_to_hub: bool = option(False, "Publish the finished run on the Hub.")
    hub_model_id: str | None = option(None, "Its name there. Default: output_dir's.")
    hub_strategy: str = option("end", f"When: {', '.join(HUB_STRATEGIES)} (these two to go on from).")
    hub_private_repo: bool | None = option(None, "Whether it is private.")
    hub_revision: str | None = option(None, "Branch.")
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "Access token. Default: the stored one."})


def parse_arguments(argv: list[str]) -> Arguments:
    """Read a YAML file and flags.

    Raises:
        InputError: They cannot be read, or go together in no way.
    """
    (args,) = parse_config_and_flags((Arguments,), argv, usage="train.py CONFIG.yaml [--key value ...]")
    check_arguments(args)
    return args


def check_arguments(args: Arguments) -> None:
    """Refuse what is out of range or contradicts itself.

    Raises:
        InputError: With the first such thing.
    """
    least = {
        **dict.fromkeys(("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "lora_r"), 1),
        **dict.fromkeys(("gradient_accumulation_steps", "logging_steps", "held_out_rows", "resolution"), 1),
        **dict.fromkeys(("num_inference_steps", "max_train_samples", "save_total_limit"), 1),
        **dict.fromkeys(("eval_steps", "save_steps", "warmup_steps", "max_grad_norm", "learning_rate"), 0),
    }
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise InputError(f"{name} is {value}; it must be at least {bound}.")
    if args.resolution % 8:
        raise InputError(f"resolution is {args.resolution}; it must be a multiple of 8.")
    for name, choices in (
        ("train", ("lora", "full")),
        ("mixed_precision", (None, "no", "fp16", "bf16")),
        ("hub_strategy", HUB_STRATEGIES),
    ):
        if getattr(args, name) not in choices:
            raise InputError(f"{name} is {getattr(args, name)!r}; choose one of {', '.join(filter(None, choices))}.")
    if not 0 <= args.empty_captions <= 1:
        raise InputError(f"empty_captions is {args.empty_captions}; it must be between 0 and 1.")
    if args.train == "full" and args.train_text_encoder:
        raise InputError(
            "train_text_encoder goes with --train lora only: full training leaves the text encoder frozen."
        )
    if args.train == "lora" and args.new_unet:
        raise InputError("new_unet goes with --train full only: a LoRA needs a UNet that has learned something.")
    if args.dataset_name and args.train_data_dir:
        raise InputError("dataset_name and train_data_dir are both given; choose one.")


def describe_data(args: Arguments) -> dict:
    if args.dataset_name is None and args.train_data_dir is None:
        name = "Emoji of Twemoji with Unicode's names"
        return {"name": name, "role": "train and validation", "license": LICENSE, "attribution": ATTRIBUTION}
    name = args.dataset_name or Path(args.train_data_dir).name
    on_the_hub = args.dataset_name and not Path(args.dataset_name).exists()
    return {"name": name, "role": "train and validation"} | ({"id": name} if on_the_hub else {})


def describe_model(args: Arguments) -> dict:
    """Return what the model card should say and only we know; people with other data should add their licence."""
    card = {
        "description": "A text-to-image model that draws like its training images. Made to compare optimizers.",
        "limits": "It draws what looks like its training images; nobody checked its images for bias or offence. Its "
        "loss is comparable only between runs with the same base, data and resolution.",
        "tags": ["stable-diffusion", "text-to-image"],
    }
    if args.dataset_name is None and args.train_data_dir is None:
        card |= {"license": LICENSE, "description": f"{card['description']} Images: {ATTRIBUTION}."}
    return card


def hub_settings(args: Arguments, process_index: int) -> SimpleNamespace:
    """The options of publishing, as Trainer calls them."""
    options = {key: value for key, value in asdict(args).items() if key.startswith("hub_") or key.startswith("push_")}
    common = {"output_dir": args.output_dir, "process_index": process_index}
    return SimpleNamespace(**options, **common, hub_always_push=False)


def public(args: Arguments) -> dict:
    """The options without the access token, for records."""
    return {key: value for key, value in asdict(args).items() if key != "hub_token"}


def plain(args: Arguments) -> dict:
    """The options that are set as single values, for trackers."""
    joined = {key: ", ".join(value) if isinstance(value, list) else value for key, value in public(args).items()}
    return {key: value for key, value in joined.items() if value is not None}

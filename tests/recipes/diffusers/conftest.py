"""What the tests of the diffusers recipe train: a tiny checkpoint that knows nothing, and pictures of one colour."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from scripts import make_base, train
from transformers import CLIPTextConfig, CLIPTextModel

from hf_sai.publishing.cards import write_card

sys.path.append(str(Path(__file__).parents[2] / "publishing"))  # the Hub's stand-in of those tests


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in Stable Diffusion layout whose parts have learned nothing: 16 pixels, latents of 4 x 4."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = make_base.train_tokenizer(["animal: cat", "animal: dog", "flag: red and blue"] * 4)
    blocks = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": 16}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, **blocks
    )
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=make_base.MAX_WORDS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**make_base.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 pictures of one colour each, of different sizes, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for index in range(20):
        name, color = f"{index:02}.png", (10 * index, 255 - 10 * index, 100)
        Image.new("RGB", (16 + index % 3, 16), color).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"animal: cat {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Draw nothing in this process: it takes longer than the training, and the smoke run in its own process does."""
    monkeypatch.setattr(train, "finish_run", lambda folder: [write_card(folder)])


@pytest.fixture
def arguments(tiny, photos, tmp_path):
    """A LoRA of the tiny checkpoint on the photos, 4 steps."""
    return [
        *("--pretrained_model_name_or_path", str(tiny), "--train_data_dir", str(photos), "--resolution", "16"),
        *("--max_steps", "4", "--per_device_train_batch_size", "4", "--held_out_rows", "4", "--use_cpu", "true"),
        *("--num_inference_steps", "2", "--logging_steps", "2", "--disable_tqdm", "true"),
        *("--output_dir", str(tmp_path / "run")),
    ]

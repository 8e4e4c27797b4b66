"""The diffusers recipe's input: emoji and own pictures are read, what cannot be used is refused in one sentence."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from scripts import emoji_data, image_data, make_base, optimizers, train

from recipes.common.recipe_input import InputError


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim", "adamwww"], "cannot use the optimizer adamwww: adamwww is not a valid OptimizerNames"),
        (["--optim", "prodigy"], "cannot use the optimizer prodigy"),
        (["--optim_args", "momentun=0.9"], "unknown key 'momentun'"),
        (["--optim_args", "lr_ratios=lora_C:2"], "this model has: default/lora_A, default/lora_B, lora_A, lora_B"),
        (["--caption_column", "words"], "has no column 'words'.* name one of image, text"),
        (["--image_column", "text"], "the column 'text' of .* holds no images"),
        (["--held_out_rows", "20"], "has 20 images with a caption: too few to hold out 20"),
        (["--resize", "false"], "has 17 x 16 pixels, not 16 x 16; allow --resize true"),
        (["--train_data_dir", "/nowhere"], "there is no folder /nowhere"),
        (["--pretrained_model_name_or_path", "/nowhere/model"], "cannot load /nowhere/model"),
        (["--lora_target_modules", "c_attn"], "Layers of this UNet: .*conv1.*to_out.0"),
        (["--resolution", "20"], "resolution is 20; it must be a multiple of 8"),
        (["--mixed_precision", "fp16"], "mixed_precision is fp16, which needs a GPU; on a CPU give bf16"),
        (["--lora_r", "0"], "lora_r is 0; it must be at least 1"),
        (["--train", "half"], "train is 'half'; choose one of lora, full"),
        (["--lr_scheduler_type", "zigzag"], "cannot make the schedule 'zigzag'"),
        (["--mixed_precision", "int3"], "mixed_precision is 'int3'; choose one of no, fp16, bf16"),
        (["--train", "full", "--train_text_encoder", "true"], "goes with --train lora only"),
        (["--report_to", "abacus"], "cannot set up Accelerate: Unsupported logging capability: abacus"),
        (["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(arguments, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as caught:
        train.main([*arguments, *more])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_optimizers_that_step_within_backward_are_refused(arguments, tmp_path, monkeypatch):
    options = {"optimizer_dict": {}}
    monkeypatch.setattr(optimizers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, options))
    with pytest.raises(InputError, match="only Trainer supports"):
        train.main(arguments)


def broken_photos(folder, *, captions=True, corrupt=False):
    folder.mkdir(parents=True)
    lines = []
    for index in range(6):
        Image.new("RGB", (16, 16)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"animal: cat {index}" if captions else " "}))
    if corrupt:
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return ["--train_data_dir", str(folder), "--held_out_rows", "1"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"captions": False}, "has 0 images with a caption"),
        ({"corrupt": True}, r"cannot read .*3\.png: .*; repair it or take it out"),
    ],
)
def test_unusable_images_are_refused_before_anything_is_written(arguments, tmp_path, fault, message):
    with pytest.raises(InputError, match=message):
        train.main([*arguments, *broken_photos(tmp_path / "photos", **fault)])
    assert not (tmp_path / "run").exists()


def test_data_without_a_split_to_train_on_or_with_numbers_for_captions_are_refused(arguments, tmp_path):
    more = broken_photos(tmp_path / "photos" / "test")
    with pytest.raises(InputError, match="has no split named train, only test"):
        train.main([*arguments, *more, "--train_data_dir", str(tmp_path / "photos")])
    lines = [json.dumps({"file_name": f"{index}.png", "text": index}) for index in range(6)]
    (tmp_path / "photos" / "test" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="holds 0, but captions must be texts"):
        train.main([*arguments, *more])
    assert not (tmp_path / "run").exists()


def test_folder_without_captions_says_what_it_needs(arguments, tmp_path):
    more = broken_photos(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"no column 'text' \(an image folder needs a metadata.jsonl"):
        train.main([*arguments, *more])


def configure(part, **values):
    """Change a part's configuration, and its weights where they would no longer fit."""

    def change(folder):
        file = next((folder / part).glob("*config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        if "cross_attention_dim" in values:
            UNet2DConditionModel.from_config(json.loads(file.read_text())).save_pretrained(folder / part)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (configure("unet", addition_embed_type="text_time"), "is of the Stable Diffusion XL kind"),
        (
            configure("unet", cross_attention_dim=24),
            "text encoder is 16 wide, but the UNet takes 24; they do not belong",
        ),
        (configure("scheduler", prediction_type="sample"), "predicts sample; allowed: epsilon, v_prediction"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "layout: it has no unet/config.json"),
        (lambda folder: (folder / "text_encoder_2").mkdir(), "a transformer or a second text encoder"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot load"),
    ],
)
def test_checkpoint_of_another_layout_is_refused(arguments, tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(InputError, match=message):
        train.main([*arguments, "--pretrained_model_name_or_path", str(tmp_path / "other")])
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_neither_mixed_up_nor_lost(arguments, tmp_path):
    train.main([*arguments, "--max_steps", "2", "--save_steps", "1"])
    with pytest.raises(InputError, match="is from an earlier run"):
        train.main(arguments)
    with pytest.raises(InputError, match="is from step 2; max_steps is 2"):
        train.main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    train.main([*arguments, "--max_steps", "1", "--restart", "true"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_diverged_run_says_so_and_saves_no_weights(arguments, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+; take a smaller --learning_rate"):
        train.main([*arguments, "--train", "full", "--optim", "sgd", "--learning_rate", "1e30", "--max_grad_norm", "0"])
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_emoji_are_split_by_caption_and_have_names_of_unicode():
    splits = emoji_data.load_emoji(["animal", "flag"])
    train_texts, held_out = list(splits["train"]["text"]), list(splits["validation"]["text"])
    assert "animal: tiger face" in train_texts + held_out
    assert "flag: Brazil" in train_texts + held_out
    assert not set(train_texts) & set(held_out)
    assert 0.08 < len(held_out) / len(train_texts) < 0.2
    with pytest.raises(InputError, match="no emoji category is called plant; choose among smiley"):
        emoji_data.load_emoji(["plant"])


def test_transparent_pictures_get_a_white_ground_and_the_middle_is_cut_out(tmp_path):
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 0, 30, 20))
    picture.save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "x"}))
    rows = image_data.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", drop_labels=True)
    (part,) = image_data.read_pictures(rows, "image", 20)
    torch.testing.assert_close(part[0, :, 10, 10], torch.tensor([1.0, -1.0, -1.0]))
    (narrow,) = image_data.read_pictures(rows, "image", 10)
    assert narrow.shape == (1, 3, 10, 10)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "0.png")
    rows = image_data.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", drop_labels=True)
    assert next(image_data.read_pictures(rows, "image", 20)).min() == 1.0


def test_tokenizer_spells_words_it_has_never_seen():
    tokenizer = make_base.train_tokenizer(["animal: cat", "animal: dog"])
    ids = tokenizer("flag: São Tomé").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "flag:sãotomé"
    assert len(ids) < make_base.MAX_WORDS
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)

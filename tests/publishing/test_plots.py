"""Pictures: they show what the records hold, on every page, for every eye, and say why if they cannot."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from hf_sai.cli.main import main
from hf_sai.publishing.plots import (
    BACKGROUND,
    COLORS,
    MAX_LAYERS,
    MAX_ROLES,
    TEXT,
    draw,
    layer_and_kind,
    plot_gsnr,
    plot_loss,
    plot_updates,
    save_pictures,
)
from hf_sai.runs.record import RunRecord


def make_record(name="sgd", optimizer="SGDSaI", state_bytes=4_300_000, offset=0.0):
    history = [
        {"step": step, "loss": 5 - step / 20 + offset, "sai/update_ratio/base/decay": 0.01 / step}
        for step in range(1, 41)
    ]
    history += [{"step": step, "eval_loss": 5.1 - step / 20 + offset} for step in (10, 20, 30, 40)]
    names = [f"transformer.h.{i}.{part}" for i in range(3) for part in ("attn.c_attn.weight", "mlp.c_fc.weight")]
    parameters = [
        {"name": n, "group": "base/decay", "shape": [8, 8], "gsnr": 8.0 + i, "ratio": 1 + i / 8}
        for i, n in enumerate(names)
    ]
    parameters.append({"name": "lm_head.weight", "group": "base/decay", "shape": [8, 8], "gsnr": None, "ratio": None})
    return RunRecord(
        run={"name": name},
        optimizer={"name": optimizer, "state_bytes": state_bytes},
        gsnr={"parameters": parameters} if optimizer == "SGDSaI" else {},
        history=history,
    )


def line_with(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_loss_curves_hold_every_point_of_every_run():
    runs = [make_record(), make_record("adamw", "AdamW", 8_600_000, offset=0.2)]
    over_steps, over_bytes = plot_loss(runs).axes
    drawn = [tuple(map(tuple, line.get_xydata())) for line in over_steps.get_lines()]
    for run in runs:
        assert tuple(run.curve("loss")) in drawn
        assert tuple(run.curve("eval_loss")) in drawn
    assert {text.get_text() for text in over_steps.get_legend().get_texts()} == {"sgd (SGDSaI)", "adamw (AdamW)"}
    points = {tuple(line.get_xydata()[-1].round(6)) for line in over_bytes.get_lines()}
    assert points >= {(4_300_000, 3.1), (8_600_000, 3.3)}


def test_loss_is_drawn_over_time_where_records_know_it():
    runs = [make_record(), make_record("adamw", "AdamW", 8_600_000, offset=0.2)]
    runs[1].timing = {"steps": 40, "step_seconds": 80.0}
    _, over_time, _ = plot_loss(runs).axes
    drawn = [tuple(map(tuple, line.get_xydata())) for line in over_time.get_lines()]
    assert drawn == [tuple((2.0 * step, loss) for step, loss in runs[1].curve(key)) for key in ("loss", "eval_loss")]


def test_the_gsnr_map_has_a_row_per_kind_and_marks_the_unmeasured():
    axes = plot_gsnr(make_record()).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["other", "0", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["attn.c_attn.weight", "mlp.c_fc.weight", "lm_head.weight"]
    values = axes.collections[0].get_array()
    assert values[0][1] == 1.0
    assert values[1][3] == 1 + 5 / 8
    crosses = [tuple(line.get_xydata()[0]) for line in axes.get_lines()]
    assert crosses == [(0.5, 2.5)]


def test_update_ratios_are_drawn_per_role():
    axes = plot_updates(make_record()).axes[0]
    assert axes.get_yscale() == "log"
    assert len(line_with(axes, "base/decay").get_xydata()) == 40


def test_a_picture_brings_its_own_opaque_background_and_is_the_same_each_time():
    first, second = draw(plot_loss([make_record()])), draw(plot_loss([make_record()]))
    assert first == second
    image = Image.open(io.BytesIO(first)).convert("RGBA")
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((2, 2))) == BACKGROUND
    assert image.getchannel("A").getextrema() == (255, 255)
    assert image.width > 1000


def linear(color):
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089] + 1e-9)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado et al. 2009, severity 1: how linear RGB looks without one kind of cone.
SIGHT = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_every_two_colours_differ_for_every_eye(sight):
    seen = [lab(SIGHT[sight] @ linear(color)) for color in COLORS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 25


def test_colours_and_text_stand_out_from_the_background():
    def contrast(color):
        light = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (color, BACKGROUND)), reverse=True)
        return (light[0] + 0.05) / (light[1] + 0.05)

    assert min(map(contrast, COLORS)) >= 3
    assert contrast(TEXT) >= 7


def test_all_pictures_of_two_runs_are_saved(tmp_path):
    files = save_pictures([make_record("a/../b"), make_record("adamw", "AdamW")], tmp_path / "p")
    assert sorted(f.name for f in files) == sorted(
        f"{name}.png" for name in ("loss", "gsnr-a_.._b", "updates-a_.._b", "updates-adamw")
    )
    assert all(f.parent == tmp_path / "p" for f in files)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: plot_loss([]), "0 runs were given; a picture takes 1 to 6"),
        (lambda: plot_loss([make_record()] * 7), "7 runs were given"),
        (lambda: plot_loss([RunRecord(run={"name": "empty"})]), r"none of the records \(empty\) holds a loss"),
        (lambda: plot_gsnr(make_record(optimizer="AdamW")), "AdamW, which has no g-SNR"),
        (lambda: plot_updates(RunRecord(run={"name": "x"})), "x has no update-to-weight ratios"),
    ],
)
def test_what_cannot_be_drawn_is_said(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_runs_of_one_name_have_pictures_of_their_own(tmp_path):
    files = save_pictures([make_record("run"), make_record("run"), make_record("run-2")], tmp_path)
    assert len(files) == len({path.name for path in files}) == 7
    assert {path.name for path in files} >= {"gsnr-run.png", "gsnr-run-2.png", "gsnr-run-2-2.png"}


def test_a_picture_that_is_not_drawn_is_told_with_the_reason(tmp_path, caplog):
    save_pictures([make_record(), make_record("adamw", "AdamW")], tmp_path)
    assert "No picture gsnr-adamw.png: adamw was trained with AdamW, which has no g-SNR to draw." in caplog.text
    with pytest.raises(ValueError, match="7 runs were given"):
        save_pictures([make_record()] * 7, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_record_with_nothing_to_draw_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        save_pictures([RunRecord()], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_and_values_are_drawn_as_text():
    record = make_record(name=r"$\frac{1}{0}$ <script>" + "x" * 500)
    record.history[0]["loss"] = 1e300
    record.gsnr["parameters"][0].update(name=r"h.9999999999.$\undefined{$", ratio=0.0)
    for plot in (lambda r: plot_loss([r]), plot_gsnr, plot_updates):
        assert len(draw(plot(record))) > 1000


def test_a_record_with_very_many_layers_and_roles_is_drawn_in_part():
    record = make_record()
    row = record.gsnr["parameters"][0]
    record.gsnr["parameters"] = [{**row, "name": f"h.{i}.{'abc'[i % 3]}"} for i in range(5000)]
    assert len(plot_gsnr(record).axes[0].get_xticklabels()) == MAX_LAYERS
    record.history = [{"step": 1, **{f"sai/update_ratio/r{i}": 0.1 for i in range(5000)}}]
    assert len(plot_updates(record).axes[0].get_lines()) == MAX_ROLES


def test_layers_are_told_apart_in_unets_too():
    assert layer_and_kind("mid_block.resnets.0.norm1.weight") == ("mid_block", "resnets.norm1.weight")
    assert layer_and_kind("module.transformer.h.3.ln_1.bias") == ("3", "ln_1.bias")


def test_the_command_draws_from_directories_and_files(tmp_path, capsys):
    make_record().save(tmp_path / "a")
    make_record("adamw", "AdamW").save(tmp_path / "b" / "kept.json")
    out = tmp_path / "pictures"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b" / "kept.json"), "--out", str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["gsnr-sgd.png", "loss.png", "updates-adamw.png", "updates-sgd.png"]
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in names]


def test_the_command_refuses_a_directory_without_a_record(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "cannot read" in capsys.readouterr().err

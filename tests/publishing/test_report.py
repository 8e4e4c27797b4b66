"""The report: runs side by side on one page that needs no network, runs no script, and shows its pictures."""

import html.parser
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from test_plots import make_record

from hf_sai.cli.main import main
from hf_sai.publishing.plots import THEMES
from hf_sai.publishing.report import MAX_SHOWN, MAX_TEXT, render_report, write_report
from hf_sai.runs.record import RECORD_FILE, RunRecord

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&\"'"


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def two_runs():
    ours, theirs = make_record("ours"), make_record("theirs", "AdamW", 8_600_000, offset=0.2)
    ours.settings = {"optim": "sgd_sai", "seed": 1, "output_dir": "a", "same": 5}
    theirs.settings = {"optim": "adamw_torch", "seed": 1, "output_dir": "b", "same": 5}
    for record in (ours, theirs):
        record.samples = [{"title": "after", "text": f"by {record.name}"}]
        record.run["sessions"] = [{"command": f"python train.py {record.name}", "from_step": 0}]
    ours.gsnr["roles"] = [{"group": "base/decay", "tensors": 7, "measured": 6, "median_ratio": 1.25}]
    ours.optimizer["groups"] = [{"name": "base/decay", "tensors": 7, "elements": 448, "lr": 0.01, "weight_decay": 0.1}]
    return ours, theirs


def test_runs_stand_side_by_side():
    text = render_report(two_runs())
    page = Page(text)
    assert "<td>optimizer</td><td>SGDSaI</td><td>AdamW</td>" in text
    assert '<td>loss</td><td class="best">3.1</td><td>3.3</td>' in text
    assert "4,300,000 (4.3 MB)" in text
    assert "<td>base/decay</td><td>7</td><td>448</td><td>0.01</td><td>0.1</td><td>6 of 7</td><td>1.25</td>" in text
    for words in ("by ours", "by theirs", "python train.py ours"):
        assert words in page.text


def test_only_settings_that_differ_are_listed():
    text = render_report(two_runs())
    assert '<td>optim</td><td class="text">sgd_sai</td><td class="text">adamw_torch</td>' in text
    assert "<td>seed</td>" not in text
    assert "<td>same</td>" not in text
    assert "<td>output_dir</td>" not in text
    assert "<td>same</td>" in render_report(two_runs()[:1])


def test_the_page_asks_nothing_of_the_network_and_allows_no_script():
    page = Page(render_report(two_runs()))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        for source in (attributes.get("src"), attributes.get("srcset")):
            assert source is None or source.startswith("data:image/png;base64,"), tag
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert sum(tag == "img" for tag, _ in page.elements) == 4  # loss, one g-SNR map, two update curves


def hostile_record():
    record = make_record(HOSTILE)
    record.run.update(status=HOSTILE, sessions=[{"command": HOSTILE, "from_step": 0}])
    record.settings = {HOSTILE: HOSTILE}
    record.model = {"class": HOSTILE}
    record.hardware = {"processor": HOSTILE}
    record.optimizer.update(name=HOSTILE, groups=[{"name": HOSTILE}], options={HOSTILE: HOSTILE})
    record.data = [{"name": HOSTILE}]
    record.results = {HOSTILE: 1.0}
    record.samples = [{"title": HOSTILE, "text": HOSTILE}]
    record.images = [{"title": HOSTILE, "file": HOSTILE}]
    record.versions = {HOSTILE: HOSTILE}
    return record


def test_a_strangers_record_is_escaped():
    harmless = make_record("x")
    harmless.samples = [{"title": "t", "text": "t"}]
    page = Page(render_report([hostile_record(), harmless]))
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in page.elements)
    assert page.text.count(HOSTILE) >= 10


def test_pictures_are_embedded_only_if_they_are_the_runs_own_pngs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (4, 4), "red").save(run / "good.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "outside.png")
    (run / "page.png").write_text("<svg onload=alert(1)>")
    (run / "link.png").symlink_to(tmp_path / "outside.png")
    record = make_record()
    names = ["good.png", "../outside.png", str(tmp_path / "outside.png"), "link.png", "page.png", "missing.png", "a\0b"]
    record.images = [{"title": f"picture {index}", "file": name} for index, name in enumerate(names)]
    record.save(run)
    text = write_report([run], tmp_path / "report.html").read_text()
    assert [f"picture {index}" in text for index in range(len(names))] == [True] + [False] * 6


def test_huge_texts_are_cut():
    record = make_record("x" * 10**6)
    record.samples = [{"title": "t", "text": "y" * 10**6}]
    text = render_report([record])
    assert text.count("y" * 100) <= MAX_TEXT // 100
    assert len(text) < 15 * 10**6


def test_one_picture_named_a_thousand_times_is_embedded_a_few(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "good.png")
    record = make_record()
    record.images = [{"title": str(index), "file": "good.png"} for index in range(1000)]
    record.samples = [{"title": str(index), "text": "written"} for index in range(1000)]
    page = Page(render_report([record], [tmp_path]))
    assert sum(attrs.get("alt", "").endswith(f", {record.name}") for _, attrs in page.elements) == MAX_SHOWN
    assert page.text.count("written") == MAX_SHOWN


def test_the_command_writes_the_page_or_says_why_not(tmp_path, capsys):
    for record in two_runs():
        record.save(tmp_path / record.name)
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "ours"), str(tmp_path / "theirs" / RECORD_FILE), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    capsys.readouterr()
    (tmp_path / "ours" / RECORD_FILE).write_text("{")
    assert main(["report", str(tmp_path / "ours")]) == 1
    assert "is not JSON" in capsys.readouterr().err
    assert main(["report", *[str(tmp_path / "theirs")] * 7]) == 1
    assert "7 runs were given" in capsys.readouterr().err


def test_an_empty_record_has_a_page():
    assert "Results" in Page(render_report([RunRecord()])).text


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page with")
def test_a_real_browser_shows_the_pictures_and_runs_no_script(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render_report([hostile_record(), *two_runs()]))
    picture = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--hide-scrollbars",
    ]
    shot = [f"--screenshot={picture}", "--window-size=1200,9000", page.as_uri()]
    subprocess.run([BROWSER, *options, *shot], check=True, capture_output=True, timeout=120)
    pixels = np.array(Image.open(picture).convert("RGB")).reshape(-1, 3)
    for color in THEMES["light"].colors[:3]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(axis=1) < 8).sum() > 100, color
    dump = [BROWSER, *options, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(dump, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "<title>owned" not in dom
    assert "&lt;/title&gt;&lt;script&gt;" in dom

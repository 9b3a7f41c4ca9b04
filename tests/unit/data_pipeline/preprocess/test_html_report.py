"""The HTML report: one self-contained page that escapes file names and renders in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.records import Reject
from data_pipeline.preprocess.html_report import Page, build_report
from data_pipeline.preprocess.job import preprocess
from data_pipeline.preprocess.ledger import Ledger
from tests.support.sounds import many, path_config, write_corpus


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    root = tmp_path_factory.mktemp("report")
    corpus = write_corpus(root / "corpus", many(12) | {"<script>alert(1)</script>/x.flac": 2.0, "s/short.wav": 0.1})
    (corpus / "<img src=x onerror=alert(2)>.wav").write_bytes(b"RIFF")
    preprocess(path_config(corpus, root / "out"), progress=False)
    return root / "out" / "report.html"


def test_the_report_is_complete_and_loads_no_other_resource(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(2)&gt;.wav" in text
    assert not re.findall(r"<[^>]*(?:src|href)=(?!'data:)", text), "all images and audio are embedded in the page"
    for said in (
        "too_short",
        "unreadable",
        "Rejected files (2)",
        "duration, s",
        "speaker0",
        "Height: number of segments",
        "frequency upwards, 0 to 8 kHz",
        "recordings or segments",
        "× real time",
    ):
        assert said in text
    assert text.count("<audio") == 8
    images = re.findall(r"data:image/png;base64,([\w+/=]+)", text)
    assert len(images) == 8
    spectrogram = Image.open(io.BytesIO(base64.b64decode(images[0])))
    assert (spectrogram.mode, spectrogram.height) == ("L", 128)


def test_the_report_renders_in_a_browser(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    made = [f"--user-data-dir={tmp_path}", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1100,1600"]
    subprocess.run([*command, *made, page.as_uri()], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 50_000, "the screenshot is as small as that of an empty page"
    dom = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert dom.count("<figure") == 11
    assert dom.count("<svg") == 3


def test_names_of_any_form_are_text() -> None:
    name = "<b onclick='x'>\x1b[31m\u202e&amp;"
    shown = "&lt;b onclick=&#x27;x&#x27;&gt;\\x1b[31m\\u202e&amp;amp;"
    ledger = Ledger()
    ledger.quarantine.append(Reject(name, name, name, name, "decode", name, name))
    ledger.counts[name, name, "in", ""] += 1
    pair = {"file_id": name, "same_as": name, "reason": name, "share": 1.0, "offset_seconds": 0.0}
    text = build_report(Page(title=name, sets=[], ledger=ledger, duplicates=[pair], facts=[(name, name)]))
    assert text.replace("\n", "").isprintable()
    assert "<b onclick" not in text
    assert text.count(shown) == 12


def test_segments_without_a_speaker_are_not_a_speaker(tmp_path: Path) -> None:
    """The card counts named speakers; totals are those of the whole set."""
    corpus = write_corpus(tmp_path / "corpus", many(6) | {"unnamed.flac": 3.0, "other.flac": 3.0})
    config = path_config(corpus, tmp_path / "out")
    assert isinstance(config.corpus, PathCorpus)
    named = len({name.split("/")[0] for name in many(6)})
    config = replace(config, corpus=replace(config.corpus, pattern=r"(?P<speaker>\w+)/"))
    preprocess(config, progress=False)
    text = (tmp_path / "out" / "report.html").read_text()
    assert f"<b>{named}</b>speakers" in text
    assert "of unknown speakers" in text
    speakers = text.partition("<h2>Speakers</h2>")[2].partition("<h2>")[0]
    assert "no speaker named" in speakers
    assert f"{named} speakers" in speakers
    total = speakers.rpartition("<tr class=sum>")[2]
    assert re.findall(r"<td class=n>([\d.]+)", total)[0] == str(len(many(6)) + 2)

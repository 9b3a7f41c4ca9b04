"""The page of `auricle serve` in headless Chromium, with a sound file as its microphone."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from tests.support.contract_cases import speech_like
from tests.support.training import STREAMING_RECOGNISER, save


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "streams"
    save(run, 4, **STREAMING_RECOGNISER)
    command = [sys.executable, "-m", "auricle", "serve", f"checkpoint={run}", "port=0", "chunk=4", "left=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()
            process.wait(20)


def test_the_page_shows_text_latency_and_spectrogram(address: str, tmp_path: Path) -> None:
    """The screenshot is kept with AURICLE_SCREENSHOTS=folder."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pictures = Path(os.environ.get("AURICLE_SCREENSHOTS", tmp_path))
    speech = tmp_path / "speech.wav"
    soundfile.write(speech, speech_like(4.0, 3).numpy(), 16_000)
    options = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={speech}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        for begin in (lambda: page.click("#microphone"), lambda: drop(page, speech)):
            begin()
            wait(page, lambda: len(page.inner_text("#stable") + page.inner_text("#finals")) > 3)
            wait(page, lambda: page.inner_text("#seconds") > "0:02.00")
            assert set(page.inner_text("#stable")) <= set(" ab")
            assert re.fullmatch(r"\d+ ms", page.inner_text("#latency"))
            assert "175 ms (chunk 4, left 2)" in page.inner_text("#delay")
            assert colours(page) > 50
            page.click("#stop")
            page.wait_for_selector("#finals td")
            wait(page, lambda: page.inner_text("#status") == "finished")
            page.screenshot(path=pictures / "serve.png")
            assert page.is_disabled("#stop")
        (tmp_path / "no.wav").write_bytes(b"nothing")
        page.set_input_files("#file", tmp_path / "no.wav")
        page.wait_for_selector("#status.error")
        assert "no.wav is not an audio file" in page.inner_text("#status")
        assert problems == []
        browser.close()


def drop(page: Any, file: Path) -> None:
    """Drops a sound file on the page."""
    data = page.evaluate_handle(
        "(text) => { const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));"
        "const data = new DataTransfer(); data.items.add(new File([bytes], 'dropped.wav')); return data; }",
        base64.b64encode(file.read_bytes()).decode(),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def wait(page: Any, found: Callable[[], bool]) -> None:
    """Waits for a state of the page; its security policy forbids Playwright's own functions that evaluate text."""
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline, page.inner_text("body")
        page.wait_for_timeout(50)


def colours(page: Any) -> int:
    """Returns how many colours the spectrogram has; one where nothing was drawn."""
    found: int = page.evaluate(
        "() => { const c = document.getElementById('spectrogram');"
        "const d = c.getContext('2d').getImageData(c.width - 100, 0, 100, c.height).data;"
        "return new Set(new Uint32Array(d.buffer)).size; }"
    )
    return found

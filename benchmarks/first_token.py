"""Benchmark of the time from the click to the first letter in the browser: the demo with the newest nano run.

    python benchmarks/first_token.py --out benchmarks/results/first_token.json

The browser is a real chromium. Each question is about an image that is uploaded before the clock starts. The page
itself measures the time, from the click on the button to the first letter of the answer in the document.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import provenance
from qllava.surroundings import prepare_process

APP = Path(__file__).resolve().parents[1] / "demo" / "app.py"
# Resolves to the milliseconds between the click and the first letter of the next answer.
CLOCK = """() => new Promise(done => {
    const answers = () => [...document.querySelectorAll('#chat .bot.message')].filter(e => e.innerText.trim()).length;
    const before = answers(), begun = performance.now();
    new MutationObserver((_, observer) => {
        if (answers() > before) { observer.disconnect(); done(performance.now() - begun); }
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
    document.querySelector('#question .submit-button').click();
})"""


@dataclass(frozen=True)
class Measured:
    """Seconds from the click to the first letter, over all questions."""

    questions: int
    """Number of questions."""
    median: float
    """Median of the seconds."""
    p95: float
    """95th percentile of the seconds."""
    longest: float
    """Longest of the seconds."""


def ask(address: str, image: Path, questions: int) -> list[float]:
    """Ask in a browser, each time in a new conversation, and return the seconds of each question."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    seconds = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(questions + 1):
            page: Any = browser.new_page()
            page.goto(address)
            page.set_input_files("#question input[type=file]", image)
            page.locator("#question .thumbnail-item").first.wait_for()
            page.locator("#question textarea").fill("What colour is the circle?")
            seconds.append(page.evaluate(CLOCK) / 1000)
            page.close()
        browser.close()
    return seconds[1:]  # the first includes what is loaded on first use


def measure(model: str, questions: int) -> Measured:
    """Start the demo, ask the questions, and stop the demo."""
    from qllava.nano import scenes

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        scenes.render(scenes.sample_scene(random.Random(7), "test")).save(image)
        flags = ["--model", model, "--port", str(port), "--votes", str(Path(folder) / "votes.jsonl")]
        process = subprocess.Popen([sys.executable, str(APP), *flags])
        try:
            while not _answers(address):
                if process.poll() is not None:
                    raise SystemExit("The demo has ended; see its message above.")
                time.sleep(0.5)
            seconds = sorted(ask(address, image, questions))
        finally:
            process.terminate()
            process.wait(20)
    return Measured(
        questions=questions,
        median=round(statistics.median(seconds), 3),
        p95=round(seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))], 3),
        longest=round(seconds[-1], 3),
    )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def main() -> int:
    """Measure, and print and write the figures with date, machine and commit."""
    parser = argparse.ArgumentParser(description="Measure the seconds from the click to the first letter of an answer.")
    parser.add_argument("--model", default="nano", help="value of the demo's --model (default: nano)")
    parser.add_argument("--questions", type=int, default=20, help="number of questions to ask (default: 20)")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.questions)
    figures = {**asdict(found), **provenance("cpu")}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())

"""The demo as a user starts it, and a visitor without a browser that sends what Gradio's page would send."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import commands
from tests.commands import Command
from tests.tiny_models import make_tiny_model, make_tiny_processor

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"


# The demo, which prints on SIGUSR1 how many answers it is computing.
WATCHED = """
import signal, sys, threading
def say(*_):
    print("computing:", sum(thread.name == "qllava-generate" for thread in threading.enumerate()), flush=True)
signal.signal(signal.SIGUSR1, say)
from qllava.pages.server import main
sys.exit(main())
"""


@contextmanager
def served(model: Path, *flags: str, watched: bool = False, fresh: bool = False) -> Iterator[tuple[str, Command]]:
    """Run `python demo/app.py --model MODEL FLAGS` on a free port; give its address and its process.

    The demo runs in the parent folder of the model; its output is `demo.log` there, and `kept_by` lists its images.

    Args:
        model: Folder of the model.
        flags: Further arguments.
        watched: Whether `computes` can be used.
        fresh: Whether the demo imports Gradio itself, for tests of the environment that Gradio reads at import.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = model.parent / "demo.log"
    program = ["-c", WATCHED] if watched else [str(ROOT / "demo" / "app.py")]
    line = [*program, "--model", str(model), "--port", str(port), *flags]
    temporary = model.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    how: dict[str, Any] = {"cwd": model.parent, "env": environment}
    if fresh:
        with log.open("wb") as out:
            process: Any = subprocess.Popen([sys.executable, *line], stdout=out, stderr=out, **how)
    else:
        process = commands.start(*line, out=log, together=True, **how)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _answers(address), 120, lambda: log.read_text())
        if process.poll() is not None:
            pytest.fail(f"the demo ended: {log.read_text()}")
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def kept_by(model: Path) -> list[Path]:
    """Return the files that the demo of a model has on disk, without its own examples."""
    # os.walk, because pathlib's glob raises where the demo deletes a folder meanwhile (Python 3.11).
    found = [Path(folder) / name for folder, _, names in os.walk(model.parent / "tmp") for name in names]
    return [path for path in found if "examples" not in path.parts]


def wait_until(true: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    """Wait for a condition; fail the test with an explanation if it takes too long."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"nothing happened for {seconds} s {explain()}")
        time.sleep(0.1)


def computes(process: Command, folder: Path) -> bool:
    """Return whether a watched demo that runs in `folder` is computing an answer."""
    log = folder / "demo.log"
    before = log.read_text().count("computing:")
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: log.read_text().count("computing:") > before, 10)
    return not log.read_text().rpartition("computing: ")[2].startswith("0")


def endless_model(folder: Path) -> Path:
    """Write a model that computes for long and never ends an answer, and return its folder."""
    processor = make_tiny_processor()
    model = make_tiny_model(processor, context=2048, layers=48)
    model.lm_head.weight.data[processor.tokenizer.eos_token_id] = 0.0  # a logit of 0 is never the largest
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def memory_of(process: Command) -> float:
    """Return the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Visitor:
    """One open page: its cookie, its session, and the handlers that it may call."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=120)
        weakref.finalize(self, self.client.close)
        self.client.get("/")
        self.session = secrets.token_hex(5)
        self.hears = threading.Event()  # set at the first words of an answer
        config = self.client.get("/config").json()
        self.handlers = {dep["id"]: dep for dep in config["dependencies"]}
        self.components = {c["id"]: c for c in config["components"]}

    def upload(self, path: Path | None = None, *, name: str = "", content: bytes = b"") -> httpx.Response:
        """Upload a file, and return the response."""
        files = {"files": (path.name, path.read_bytes()) if path else (name, content)}
        return self.client.post("/gradio_api/upload", files=files)

    def file(self, path: str) -> dict[str, Any]:
        """Return an uploaded file in the form that events have."""
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def ask(self, text: str, *uploads: str, box: str = "question") -> list[Any]:
        """Send a question as the text box does, wait for the answer, and return the outputs of the last step.

        For the chat these are chatbot, text box, pace; for the comparison question, both answers, text box, buttons,
        result.
        """
        message = {"text": text, "files": [self.file(path) for path in uploads]}
        submit = self._handler(box, "submit")
        asked = self._call(submit, [message, *self._values(self.handlers[submit]["inputs"][1:])])
        return self.answer(box) if asked else []

    def answer(self, box: str, *, wait: bool = True) -> list[Any]:
        """Call the step after `submit`, the model's answer, and return its outputs."""
        submit = self._handler(box, "submit")
        then = next(i for i, dep in self.handlers.items() if dep["trigger_after"] == submit)
        return self._call(then, self._values(self.handlers[then]["inputs"]), wait=wait)

    def press(self, box: str, event: str, data: list[Any] | None = None, *, wait: bool = True) -> list[Any]:
        """Call the handler of a component's event; return its outputs, or none, with the reason in `refused`."""
        return self._call(self._handler(box, event), data or [], wait=wait)

    def _call(self, handler: int, data: list[Any], *, wait: bool = True) -> list[Any]:
        """Send one event through the queue, and return its outputs."""
        body = {"data": data, "fn_index": handler, "session_hash": self.session, "trigger_id": None}
        joined = self.client.post("/gradio_api/queue/join", json=body)
        self.refused = "" if joined.is_success else joined.text
        found: list[Any] = []
        if not joined.is_success or not wait:
            return found
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") == "process_completed":
                    output = event["output"]
                    self.refused = "" if event["success"] else str(output.get("error"))
                    return output.get("data") or found if event["success"] else []
                if event.get("msg") == "process_generating" and not found:
                    self.hears.set()
                    found = event["output"].get("data") or []  # later events hold only changes
        return found

    def _values(self, components: list[int]) -> list[Any]:
        return [self.components[i]["props"].get("value") for i in components]

    def _handler(self, box: str, event: str) -> int:
        return next(i for i, dep in self.handlers.items() if self._triggers(dep, box, event))

    def _triggers(self, dep: dict[str, Any], box: str, event: str) -> bool:
        return any(
            kind == event and self.components.get(target, {}).get("props", {}).get("elem_id") == box
            for target, kind in dep["targets"]
        )


def texts(messages: list[dict[str, Any]], role: str = "assistant") -> list[str]:
    """Return the texts of one role in a chatbot's value."""
    return [
        "".join(part["text"] for part in message["content"] if part.get("type") == "text")
        for message in messages
        if message["role"] == role
    ]


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.HTTPError:
        return False

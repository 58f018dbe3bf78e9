"""Helpers of the tests of synthesis: images described in words, and a teacher that answers well or badly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.llm.server import Request, Said

THINGS = ("dog", "cat", "bicycle", "umbrella", "bench", "clock", "kite", "horse", "pizza", "vase", "boat", "zebra")


def write_contexts(path: Path, count: int) -> Path:
    """Write contexts of images with two things each, as JSONL, and return the path."""
    rng = random.Random(count)
    lines = []
    for number in range(count):
        left, right = rng.sample(THINGS, 2)
        boxes = [{"category": left, "bbox": [0.1, 0.2, 0.4, 0.9]}, {"category": right, "bbox": [0.5, 0.3, 0.95, 0.8]}]
        captions = [f"A {left} next to a {right}, picture {number}.", f"Close to a {right} there is a {left}."]
        lines.append({"id": f"p{number:04d}", "image": f"p{number:04d}.png", "captions": captions, "boxes": boxes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def things_of(request: Request) -> tuple[str, str]:
    """Return the two things in the image that a request is about."""
    seen = [m["content"] for m in request.body["messages"] if ", picture " in m["content"]][-1]
    words = seen.partition(",")[0].split()
    return words[1], words[-1]


def kind_of(request: Request) -> str:
    """Return the response type, recognized by its system message."""
    system = request.body["messages"][0]["content"]
    return (
        next(
            kind
            for kind, words in {"conversation": "Write the conversation", "detail": "one description"}.items()
            if words in system
        )
        if "one question about the photograph" not in system
        else "reasoning"
    )


def good(request: Request, lie: str = "") -> str:
    """Return a reply that follows every rule, in the requested form; `lie` is added to its last answer."""
    left, right = things_of(request)
    if (kind := kind_of(request)) == "detail":
        return f"In the left half there is a {left}, and to its right a {right}. {lie}".strip()
    pairs = [
        ("What is on the left?", f"There is a {left}."),
        ("And next to it?", f"A {right} is next to it. {lie}".strip()),
    ]
    if kind == "reasoning":
        pairs = [
            ("Why might they be together?", f"The {left} and the {right} were put there on purpose. {lie}".strip())
        ]
    if "response_format" in request.body:
        return json.dumps({"turns": [{"question": q, "answer": a} for q, a in pairs]})
    return "\n===\n".join(f"Question: {q}\n===\nAnswer: {a}" for q, a in pairs)


def is_repair(request: Request) -> bool:
    """Return whether a request asks for a corrected reply."""
    return request.last.startswith("This cannot be used:")


def well(request: Request) -> Said:
    """Answer with a good reply."""
    return Said(good(request))


def badly(request: Request) -> Said:
    """Answer with every kind of fault, chosen by the content of the request, so that a second run gets the same."""
    fate = int(request.key[:8], 16) % 100
    if request.before == 0:
        trouble: dict[range, Said] = {
            range(8): Said("busy", status=429, headers={"Retry-After": "0.02"}),
            range(8, 14): Said("broken", status=500),
            range(14, 18): Said("overloaded", status=503, headers={"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
            range(18, 24): Said(good(request), drop=True),
            range(24, 28): Said(status=502, body=b"<html>bad gateway</html>"),
        }
        for fates, said in trouble.items():
            if fate in fates:
                return said
    left, _ = things_of(request)
    text = good(request)
    faults: dict[range, Said] = {
        range(28, 34): Said(text[: len(text) // 2], finish_reason="length"),
        range(34, 38): Said('{"turns": [{"question": "What is', finish_reason="stop"),
        range(38, 42): Said("I'm sorry, but I can't help with that."),
        range(42, 45): Said(None, refusal="No."),
        range(45, 52): Said(good(request, "A toothbrush lies in front.")),
        range(52, 55): Said(good(request, f"The bounding box of the {left} is [0.100, 0.200, 0.400, 0.900].")),
        range(55, 58): Said(good(request, "The captions do not say more.")),
        range(58, 60): Said(body=b'{"choices": [{"mess'),
        range(60, 62): Said(""),
        range(62, 66): Said(text, seconds=0.2),
    }
    return next((said for fates, said in faults.items() if fate in fates), Said(text))


def read_lines(path: Path) -> list[Any]:
    """Return the records of a JSONL file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

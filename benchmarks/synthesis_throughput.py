"""Benchmark of the data engine's throughput: calls per second, relative to what the server could answer.

    python -m benchmarks.synthesis_throughput --out benchmarks/results/synthesis_throughput.json

The server is another process on this machine. It speaks the protocol, handles a fixed number of requests at a time
(slots), and takes the same time for each, so it can answer at most slots / seconds requests per second. All calls start
at once and run through everything that `qllava synthesize` does: prompts, requests, the store with its flush to the
disk after each reply, rules, examples.

    ratio    calls per second over slots / seconds, from the first request that the server received to its last answer
    whole    the same for the whole run, with reading the store and writing the examples
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from qllava.data.contexts import Context
from qllava.surroundings import prepare_process
from qllava.synthesis import pipeline
from qllava.synthesis.pipeline import Job
from qllava.synthesis.prompting import Prompts
from qllava.synthesis.tasks import Asking, make_tasks

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ((16, 0.2), (50, 0.5), (100, 0.5), (100, 0.25))  # slots, seconds
REPLY = "A quiet scene that takes up the whole picture. " * 20


async def serve(slots: int, seconds: float) -> None:
    """Answer requests until the process ends.

    The port is printed at the start; a request for `/times` returns when the first request and the last answer were.
    """
    free = asyncio.Semaphore(slots)
    times: list[float] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            body = await reader.readexactly(_length(head))
            if b"/times" in head:
                answer = {"first": min(times), "last": max(times), "answers": len(times) // 2}
            else:
                times.append(time.monotonic())
                asked = sum(len(message["content"]) for message in json.loads(body)["messages"]) // 4
                async with free:
                    await asyncio.sleep(seconds)
                times.append(time.monotonic())
                choice = {"message": {"role": "assistant", "content": REPLY}, "finish_reason": "stop"}
                answer = {"choices": [choice], "usage": {"prompt_tokens": asked, "completion_tokens": len(REPLY) // 4}}
            content = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def _length(head: bytes) -> int:
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(lines[0].partition(b":")[2]) if lines else 0


def measure(slots: int, seconds: float, calls: int) -> dict[str, Any]:
    """Run `calls` calls at once, and return the server's limit and both ratios.

    Raises:
        SystemExit: If a call is lost or was made twice.
    """
    line = [sys.executable, "-m", "benchmarks.synthesis_throughput", "--serve", str(slots), str(seconds)]
    with (
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        tasks = make_tasks([Context(f"{n}", f"{n}.jpg", (f"Image {n}.",), ()) for n in range(calls)], ("detail",))
        job = Job(tasks, Asking("m", Prompts()), Path(folder, "out.json"), Path(folder, "calls.jsonl"))
        started = time.monotonic()
        result = pipeline.run(job, url, concurrency=calls)
        whole = time.monotonic() - started
        times = httpx.get(f"{url}/times").json()
        server.kill()
    if not times["answers"] == result.calls == result.counts.total("accepted") == calls:
        raise SystemExit(f"Calls were lost or repeated: {calls} calls, {times['answers']} answers, {result.to_json()}")
    limit = slots / seconds
    return {
        "limit_per_second": limit,
        "ratio": calls / (times["last"] - times["first"]) / limit,
        "whole": calls / whole / limit,
    }


def main() -> None:
    """Measure each setting, print a line for it, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs=2, metavar=("SLOTS", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(int(arguments.serve[0]), float(arguments.serve[1])))
        return
    results = []
    for slots, seconds in SETTINGS:
        runs = [measure(slots, seconds, arguments.calls) for _ in range(arguments.repeats)]
        ratios = sorted(run["ratio"] for run in runs)
        result = {
            "slots": slots,
            "seconds": seconds,
            "limit_per_second": slots / seconds,
            "ratio": round(statistics.median(ratios), 3),
            "ratio_lowest": round(ratios[0], 3),
            "whole": round(statistics.median(run["whole"] for run in runs), 3),
        }
        results.append(result)
        print(json.dumps(result), flush=True)
    if arguments.out:
        from importlib.metadata import version

        from benchmarks.machine import provenance  # imports torch, which the server does not need

        about = {**provenance("cpu"), "versions": f"httpx {version('httpx')}", "calls": arguments.calls}
        about |= {"repeats": arguments.repeats, "settings": results}
        arguments.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    prepare_process()
    main()

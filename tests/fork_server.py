"""The process that `tests.commands` forks: it has imported the libraries, no code of ours, and has only one thread.

    python tests/fork_server.py FILE_DESCRIPTOR LISTENING

Each message on the first socket is a command as JSON, with the file descriptors of its stdout, its stderr and a pipe
for its status; `tests.forked_python` sends the same to the second. The server forks a watcher, and the watcher forks
the command. The watcher writes the command's process id, waits, and writes its exit status. The command itself leaves
the loop and runs as the interpreter would have run it, so that it ends as every Python program does: with tracebacks,
waiting for threads, and `atexit`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

# Modules that commands import; if a release renames one, commands are slower, but nothing breaks.
LIBRARIES = (
    "numpy", "PIL.Image", "open_clip", "gradio", "pyarrow.parquet", "yaml", "httpx", "safetensors.torch", "torch",
    "torch.distributed", "torch.optim.lr_scheduler", "torch.utils.data", "bitsandbytes", "datasets", "accelerate",
    "transformers", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto", "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava", "transformers.models.llava.image_processing_llava", "peft", "trl",
    "trl.trainer.sft_trainer",
)  # fmt: skip
MOST_BYTES = 1 << 18


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next command and its file descriptors, or None if the tests have ended."""
    message, given, *_ = socket.recv_fds(client, MOST_BYTES, 3)
    return (json.loads(message), given) if message else None


def serve(client: socket.socket, others: socket.socket) -> dict[str, Any] | None:
    """Fork for each command.

    Args:
        client: Socket of the tests.
        others: Listening socket; each connection requests one command.

    Returns:
        The command, in its own process; None in this process when the tests have ended.
    """
    while True:
        asking = client
        if others in select.select([client, others], [], [])[0]:
            asking, _ = others.accept()
        received = receive(asking)
        if asking is not client:
            asking.close()
        elif received is None:
            return None
        if received is None:
            continue
        command, given = received
        refuse_threads()
        if os.fork() == 0:
            client.close()
            others.close()
            if begun(*given):
                return command
        for descriptor in given:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # so that the CPU time of commands counts for the tests
                pass


def refuse_threads() -> None:
    """Check that there is one thread: a lock that another holds stays locked in a fork (jemalloc's thread is safe)."""
    tasks = Path("/proc/self/task").glob("*/comm")
    found = [task.read_text(encoding="utf-8").strip() for task in tasks]
    others = found.count("jemalloc_bg_thd") + 1
    assert len(found) <= others, f"a library started threads when it was imported: {found}"


def begun(out: int, err: int, status: int) -> bool:
    """Fork the command and watch it; return True in the command, and end the watcher when the command has ended."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.setsid()
        for descriptor, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        return True
    os.close(out)
    os.close(err)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def run(command: dict[str, Any]) -> None:
    """Run `python WORDS` in this process, with the requested folder and environment."""
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    tempfile.tempdir = None  # so that it is chosen by the new environment
    first, *words = command["words"]
    if first == "-u":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        first, *words = words
    paths = [path for path in command["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = ["" if first in ("-c", "-m") else str(Path(first).resolve().parent), *paths]
    importlib.invalidate_caches()
    if first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    """Import the libraries, serve, and run the command in each fork."""
    client = socket.socket(fileno=int(sys.argv[1]))
    others = socket.socket(fileno=int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise the first collection of each command copies every page
    command = serve(client, others)
    if command is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(command)
    else:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


if __name__ == "__main__":
    main()

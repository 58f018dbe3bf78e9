"""Replacement of `python WORDS` for launchers: the command runs as a fork of `tests.fork_server`.

    forked_python.py SOCKET WORDS

The fork gets this process's folder, environment and output. Signals are passed on to it, and its status is returned.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Request the fork, and end with its status."""
    place, *words = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a process to pass them on to
    said, status = os.pipe()
    message = json.dumps({"words": words, "cwd": str(Path.cwd()), "env": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(place)
        socket.send_fds(client, [message], [1, 2, status])
    os.close(status)
    with os.fdopen(said) as lines:
        pid = int(lines.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        ended = int(lines.readline())
    if ended < 0:
        if -ended in PASSED_ON:
            signal.signal(-ended, signal.SIG_DFL)
        os.kill(os.getpid(), -ended)
    sys.exit(ended)


if __name__ == "__main__":
    main()

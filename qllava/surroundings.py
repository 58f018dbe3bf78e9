"""Preparation of a process for unusual environments: an output that is not UTF-8, a user without a home, busy cores.

Every entry point (the command `qllava`, the recipes, the demo, the benchmarks) calls `prepare_process` first. Standard
library only, so that the entry points start instantly.
"""

from __future__ import annotations

import getpass
import io
import os
import sys
import tempfile
from pathlib import Path


def prepare_process() -> None:
    """Make sure that the process can print every text, has a home folder and a user name, and shares its cores."""
    tolerate_any_text()
    find_home()
    wait_asleep()


def tolerate_any_text() -> None:
    """Make standard output and error escape characters outside their encoding, and input replace invalid bytes.

    A pipe on Windows is cp1252, and a file name may have bytes that are not text in any encoding: without this, a print
    at the end of a run could lose its results.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def wait_asleep() -> None:
    """Make OpenMP threads sleep instead of spin while they wait for each other; call this before torch is imported.

    Spinning threads take the cores from each other when another program runs: then nano answers twenty times slower.
    Settings of the user are kept.
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def hide_gpus() -> None:
    """Hide all GPUs from this process and the processes that it starts; call this before torch is imported."""
    os.environ.update(dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), ""))


def find_home() -> None:
    """Give a process without a home folder one in the folder for temporary files, and print that on stderr.

    Containers and schedulers start programs as users without an entry in the password file, so that `HOME` is missing,
    or is `/`, which is not writable for them. Libraries then fail in various ways, or create a folder named `~`. A home
    with a `.cache` is kept even if it is read-only: it may contain the models.
    """
    if not hasattr(os, "getuid"):
        return  # on Windows every user has a profile
    if _known_user() is None:
        os.environ["LOGNAME"] = user_name()  # `getpass.getuser`, which libraries use, reads it first
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  Path's own raises an error without a home
    if home.is_absolute() and (os.access(home, os.W_OK) or (home / ".cache").is_dir()):
        return
    try:
        folder = _temporary_home()
    except OSError:
        return  # nothing can be written anywhere: the first write will report it
    os.environ["HOME"] = str(folder)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"qllava: user {user_name()} has no writable home folder, so caches are written to {folder}. Set HOME, or "
            "QLLAVA_CACHE and HF_HOME, to use other folders.",
            file=sys.stderr,
        )


def user_name() -> str:
    """Return the name of the user, or `uid-NUMBER` for one without a name."""
    return _known_user() or (f"uid-{os.getuid()}" if hasattr(os, "getuid") else "unknown")


def _known_user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # depends on Python's version and on the system
        return None


def _temporary_home() -> Path:
    """Return one folder for all processes of a user, which another user did not create, because caches are trusted."""
    folder = Path(tempfile.gettempdir()) / f"qllava-home-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="qllava-home-"))
    return folder

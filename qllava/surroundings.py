"""What a program finds around it and must not fail on: an output that is not UTF-8, a user without a home, busy cores.

Every entrance (the command `qllava`, the recipes, the demo, the benchmarks) calls `prepare_process` first. Standard
library only, so that the entrances stay instant.
"""

from __future__ import annotations

import getpass
import io
import os
import sys
import tempfile
from pathlib import Path


def prepare_process() -> None:
    """Make the process able to print every text, to find a home folder and a user name, and to share its cores."""
    tolerate_any_text()
    find_home()
    wait_asleep()


def tolerate_any_text() -> None:
    """Let standard output and error escape what their encoding lacks, and input replace what it cannot decode.

    A pipe on Windows is cp1252, and a file name may hold bytes that are no text in any encoding: without this, a print
    at the end of a run would lose its work.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def wait_asleep() -> None:
    """Let threads of OpenMP sleep while they wait for each other; they spin otherwise. Before torch is imported.

    Spinning threads take the cores from each other when another program runs: nano answers twenty times slower then.
    A choice of the user is kept.
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def hide_gpus() -> None:
    """Let this process, and those that it starts, see no GPU. Before torch is imported."""
    os.environ.update(dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), ""))


def find_home() -> None:
    """Give a process without a home folder one in the folder for temporary files, and say so on stderr.

    Containers and schedulers start programs as users that have no line in the password file, so that `HOME` is missing,
    or is `/`, where they may not write. Libraries then fail in ways of their own, or make a folder named `~`. A home
    that has a `.cache` is kept even if it is read-only: it may hold the models.
    """
    if not hasattr(os, "getuid"):
        return  # on Windows every user has a profile
    if _known_user() is None:
        os.environ["LOGNAME"] = user_name()  # where `getpass.getuser` of all libraries looks first
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  Path's own raises an error where there is none
    if home.is_absolute() and (os.access(home, os.W_OK) or (home / ".cache").is_dir()):
        return
    try:
        folder = _temporary_home()
    except OSError:
        return  # nothing can be written anywhere: whoever has to write will say so
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
    except (KeyError, OSError, ImportError):  # by version of Python and by system
        return None


def _temporary_home() -> Path:
    """The same folder in every process of a user. Another user must not have made it: caches are trusted."""
    folder = Path(tempfile.gettempdir()) / f"qllava-home-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="qllava-home-"))
    return folder

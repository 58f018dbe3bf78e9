"""Conversion of errors that libraries raise while loading a model into InputErrors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from qllava.config import InputError

# Errors of torch when a file that is read with `weights_only` contains other objects.
UNPICKLING_REFUSED = pickle.UnpicklingError
# Errors of open_clip and transformers for files that are missing, truncated, or of another architecture.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, UNPICKLING_REFUSED, SafetensorError)


@contextmanager
def one_sentence(what: str, advice: str) -> Iterator[None]:
    """Convert any error of a library while a model's files are read into one InputError.

    transformers raises many undocumented errors for a file with inconsistent values (AssertionError,
    IndexError, ZeroDivisionError, errors of its own dataclasses), so every Exception is converted
    (Ctrl-C is not an Exception).

    Args:
        what: Name of the file that is read.
        advice: Advice for the user.

    Raises:
        InputError: For any error; an InputError and an out-of-memory error are raised unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{what} cannot be read ({one_line(error)}); {advice}.") from error


def check_loading(report: Mapping[str, Any], what: str) -> None:
    """Raise InputError if transformers' loading report lists missing weights or weights of another size."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise lacks(what, missing[0], f"{len(missing)} of its weights")
    if mismatched:
        raise does_not_fit(what, *mismatched[0])


def lacks(what: str, tensor: str, which: str = "weights") -> InputError:
    """Return the error for missing tensors; `which` gives their number if it is known."""
    return InputError(
        f"{what} lacks {which}, for example {tensor}. Copy or download it again (a checkpoint of other code must be "
        "converted to transformers' names first)."
    )


def does_not_fit(what: str, tensor: str, found: Sequence[int], expected: Sequence[int]) -> InputError:
    """Return the error for a tensor with another shape than in config.json."""
    return InputError(
        f"{what} has weights that do not fit its config.json: {tensor} is {tuple(found)} and should be "
        f"{tuple(expected)}. Take config and weights from the same model."
    )


def one_line(error: BaseException) -> str:
    """Return the message of a library's error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    if "custom code" in text and "trust_remote_code" in text:  # replace transformers' advice to run it
        return (
            "it needs its own Python code, which qllava never runs; use a model that transformers supports without it"
        )
    if "weights_only" in text:  # replace torch's advice to unpickle it
        return "it contains pickled objects, which qllava never loads; get the weights as safetensors"
    if not text or isinstance(error, KeyError):  # the key alone says nothing
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 300 else text[:297] + "..."


_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "status_alloc_failed",
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that GPU or host memory ran out.

    torch has a special error only for its CUDA allocator: its CPU allocator, cuBLAS and the CUDA runtime raise a
    plain RuntimeError, and numpy and Python a MemoryError.
    """
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in said for words in _NO_MEMORY)
    )

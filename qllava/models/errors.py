"""What other libraries raise and report when they load a model, turned into one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from qllava.config import InputError

# What torch raises when it reads a file of weights only and meets anything else.
UNPICKLING_REFUSED = pickle.UnpicklingError
# What goes wrong inside open_clip and transformers when a file is missing, cut off, or of another architecture.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, UNPICKLING_REFUSED, SafetensorError)


@contextmanager
def one_sentence(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises while a model's files are read into one InputError.

    transformers raises far more than it documents for a file whose values do not fit together (AssertionError,
    IndexError, ZeroDivisionError, errors of its own dataclasses), so nothing is left out but what a user asks for
    (Ctrl-C is not an Exception).

    Args:
        what: What is read, with its name.
        advice: What to do about it.

    Raises:
        InputError: Something was raised; an InputError, and running out of memory, come through as they are.
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
    """Raise InputError when transformers' loading report says that weights are missing or of another size."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise lacks(what, missing[0], f"{len(missing)} of its weights")
    if mismatched:
        raise does_not_fit(what, *mismatched[0])


def lacks(what: str, tensor: str, which: str = "weights") -> InputError:
    """The sentence for a model without one of its tensors; `which` says how many are missing where that is known."""
    return InputError(
        f"{what} lacks {which}, {tensor} among them; copy or download it again (a checkpoint of other code has to be "
        "converted to transformers' names first)."
    )


def does_not_fit(what: str, tensor: str, found: Sequence[int], expected: Sequence[int]) -> InputError:
    """The sentence for a tensor of another shape than config.json asks for."""
    return InputError(
        f"{what} has weights that do not fit its config.json: {tensor} is {tuple(found)} and should be "
        f"{tuple(expected)}; take config and weights from the same model."
    )


def one_line(error: BaseException) -> str:
    """Return a library's message, which may run over pages, as at most 300 characters on one line."""
    text = " ".join(str(error).split())
    if "custom code" in text and "trust_remote_code" in text:  # transformers says how to run it, which is not for here
        return "it brings code of its own, which qllava never runs; take a model that transformers itself knows"
    if "weights_only" in text:  # torch says how to unpickle all the same
        return "it holds more than tensors, and qllava unpickles nothing; get the weights as safetensors"
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
    """Return whether memory ran out, of a card or of the machine, in whatever way a library says so.

    torch has an error of its own for its CUDA allocator only: its CPU allocator, cuBLAS and the CUDA runtime raise a
    plain RuntimeError, and numpy and Python a MemoryError.
    """
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in said for words in _NO_MEMORY)
    )

"""The same calls through a batch file: vLLM's `run-batch`, or a hosted batch, does the work.

    requests   {"custom_id": KEY, "method": "POST", "url": "/v1/chat/completions", "body": {"model", "messages", ...}}
    results    {"custom_id": KEY, "response": {"status_code": 200, "body": {...}}, "error": null}

`custom_id` is the key of the store, so results may come in any order, in several files, and twice. A reply that breaks
a rule is written again by one more call: that of a second file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.data.rows import Place, read_rows
from qllava.synthesis.output import unwritable
from qllava.synthesis.store import Call, Reply, Store
from qllava.synthesis.teacher import read_reply

_AT_ONCE = 1000  # replies that are flushed to the disk together


@dataclass(frozen=True)
class Imported:
    """What a file of results held."""

    replies: int  # new ones, now kept
    known: int  # kept before
    failed: int  # requests that the server could not answer; the next export asks for them again
    foreign: int  # of other pictures, prompts or settings than those of this command


def write_requests(path: Path, calls: Iterable[Call]) -> int:
    """Write requests, each once; returns how many. The file appears whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    seen: set[str] = set()
    try:
        with aside.open("w", encoding="utf-8") as file:
            for call in calls:
                if call.key not in seen:
                    seen.add(call.key)
                    file.write(json.dumps(_request(call), ensure_ascii=False) + "\n")
        aside.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    return len(seen)


def read_results(path: Path, wanted: dict[str, Call], store: Store) -> Imported:
    """Keep the replies to the calls that are wanted (by their keys).

    Raises InputError for a line that is no result, and for a file in which nothing belongs to this command.
    """
    replies = known = failed = foreign = 0
    new: list[tuple[Call, Reply]] = []
    for custom_id, body in _results(path):
        call = wanted.get(custom_id)
        if store.get(custom_id) is not None:
            known += 1
        elif call is None:
            foreign += 1
        elif body is None:
            failed += 1
        else:
            new.append((call, read_reply(body, call)))
            replies += 1
            if len(new) == _AT_ONCE:
                store.add(*new)
                new.clear()
    store.add(*new)
    if foreign and not (replies or known or failed):
        raise InputError(
            f"{path}: none of its {foreign} results answers a call of this command; give the contexts, teacher, types, "
            "prompts and parameters with which the requests were written."
        )
    return Imported(replies, known, failed, foreign)


def _request(call: Call) -> dict[str, Any]:
    return {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": call.body()}


def _results(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and body of every result; None for a body where the request failed."""
    for place, row in read_rows(path):
        yield _result(row, place)


def _result(row: Any, place: Place) -> tuple[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str) or "response" not in row:
        raise InputError(f"{place}: this is no result of a batch; it needs custom_id and response.")
    response = row["response"]
    answered = isinstance(response, dict) and response.get("status_code", 200) == 200 and not row.get("error")
    return row["custom_id"], response.get("body") if answered else None

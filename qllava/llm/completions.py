"""A body of /chat/completions, as a server sends it or a batch file holds it, becomes a reply.

A body may be anything: half of JSON, brackets that nest thousands deep, numbers that no count can be, halves of
characters. Whatever arrived was paid, so it is a reply all the same: the whole text, with "unreadable" for a reason.
Only an error that came with status 200, as some routers send it, is not a reply (`error_of`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from qllava.llm.budget import most_prompt_tokens, reply_limit
from qllava.llm.store import Call, Reply

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON of unknown shape may raise."""

_HALF = re.compile("[\ud800-\udfff]")
_MOST = 10**9  # tokens of one reply; a larger number is none
_THOUGHTS = ("reasoning_content", "reasoning")  # fields that hold thoughts, and are paid


def read_json(body: bytes | str) -> Any:
    """Parse JSON; None where it cannot be read. Bytes may begin with a byte order mark."""
    try:
        return json.loads(_text(body))
    except (ValueError, RecursionError):
        return None


def error_of(read: Any) -> dict[str, Any] | None:
    """Return the error that a body reports in place of a reply.

    Args:
        read: The body, parsed.

    Returns:
        {"message", "status"}, the status None where the body names none; None for a body that reports no error.
    """
    if not isinstance(read, dict):
        return None
    choices = read.get("choices")
    error = read.get("error")
    if isinstance(choices, list) and choices:
        choice = choices[0] if isinstance(choices[0], dict) else {}
        error = choice.get("error") or ("the reply ended in an error" if choice.get("finish_reason") == "error" else "")
    elif not error and read.get("object") == "error":
        error = read
    if not error:
        return None
    said = error if isinstance(error, dict) else {"message": error}
    codes = [said.get(name) for name in ("code", "status", "status_code")]
    status = next((code for code in codes if isinstance(code, int) and 400 <= code < 600), None)
    return {"message": whole(str(said.get("message") or said)), "status": status}


def read_reply(body: bytes | Any, call: Call) -> Reply:
    """Return a body of /chat/completions as a reply.

    Args:
        body: As it arrived, or parsed.
        call: What was asked. Where the server has not counted its tokens, they count at the most that they can be.
    """
    raw = body if isinstance(body, bytes | str) else _dumped(body)
    try:
        read = json.loads(_text(raw))
        choice = read["choices"][0]
        message = choice["message"]
        content, refusal = _content(message.get("content")), message.get("refusal")
        if not isinstance(refusal, str | None):
            raise TypeError("a refusal is text or null")
        reason, text = str(choice.get("finish_reason") or "stop"), content
        paid = "".join([text, *(thought for name in _THOUGHTS if isinstance(thought := message.get(name), str))])
    except UNREADABLE:
        read, refusal, reason, text = {}, None, "unreadable", _text(raw)
        paid = text
    usage = read.get("usage") if isinstance(read, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    asked, said = (_count(number) for number in counts)
    return Reply(
        text=whole(text),
        finish_reason=whole(reason),
        prompt_tokens=most_prompt_tokens(call) if asked is None else asked,
        completion_tokens=_most_reply_tokens(paid, call) if said is None else said,
        refusal=None if refusal is None else whole(refusal),
    )


def whole(text: str) -> str:
    """Text with U+FFFD for halves of characters (lone surrogates), which JSON can spell and no file can hold."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def _content(content: Any) -> str:
    """The text of a message; of a list of parts those that are text, for thoughts are parts of another type."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise TypeError("content is text or null")
    return content or ""


def _count(number: Any) -> int | None:
    """A number of tokens; None for anything else that JSON can say there."""
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= _MOST else None


def _most_reply_tokens(text: str, call: Call) -> int:
    size, limit = len(text.encode(errors="replace")), reply_limit(call)
    return size if limit is None else min(size, limit)


def _text(body: bytes | str) -> str:
    text = body if isinstance(body, str) else body.decode(errors="replace")
    return text.removeprefix("\ufeff")


def _dumped(body: Any) -> str:
    try:
        return json.dumps(body)
    except RecursionError:
        return "(nested too deeply)"

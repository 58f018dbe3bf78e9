"""Conversion of a body of /chat/completions, from a server or a batch file, into a reply.

A body may be anything: truncated JSON, brackets nested thousands deep, impossible numbers, halves of characters.
Whatever arrived was paid for, so it becomes a reply with the whole text and the reason "unreadable". Only an error that
came with status 200, as some routers send it, is not a reply (`error_of`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from qllava.llm.budget import most_prompt_tokens, reply_limit
from qllava.llm.store import Call, Reply

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors that reading JSON of unknown form may raise."""

_HALF = re.compile("[\ud800-\udfff]")
_MOST = 10**9  # maximum number of tokens of one reply; a larger number is not a count
_THOUGHTS = ("reasoning_content", "reasoning")  # fields of reasoning, which is paid for


def read_json(body: bytes | str) -> Any:
    """Parse JSON, which may begin with a byte order mark; return None if it is invalid."""
    try:
        return json.loads(_text(body))
    except (ValueError, RecursionError):
        return None


def error_of(read: Any) -> dict[str, Any] | None:
    """Return the error that a body reports instead of a reply.

    Args:
        read: The body, parsed.

    Returns:
        {"message", "status"}, with status None if the body names none; None for a body without an error.
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
    """Return the reply in a body of /chat/completions.

    Args:
        body: The body as bytes, or parsed.
        call: Call that was sent; if the server reports no token counts, the maximum of the call is used.
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
    """Replace halves of characters (lone surrogates), which JSON can contain and no file can, by U+FFFD."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def _content(content: Any) -> str:
    """Return the text of a message; of a list of parts only text, because reasoning has parts of another type."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise TypeError("content is text or null")
    return content or ""


def _count(number: Any) -> int | None:
    """Return a number of tokens; None for any other value."""
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

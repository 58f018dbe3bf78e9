"""The chat: handlers for sending, editing, repeating and stopping a question.

Each function is one of Gradio's event handlers; its outputs are named in its docstring.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from qllava.config import InputError
from qllava.inference import Chat, Exchange, Session, Settings
from qllava.models.errors import out_of_memory
from qllava.pages.visitors import Visitor, Visitors

TROUBLE = "Not answered"
MAX_QUESTION = 100_000
NOTHING = "(The model gave an empty answer.)"
ASKING: dict[str, Any] = {"value": None, "submit_btn": False, "stop_btn": True}
WAITING: dict[str, Any] = {"submit_btn": True, "stop_btn": False}


class Talk:
    """Event handlers of the chat with one model."""

    def __init__(self, chat: Chat, visitors: Visitors, examples: list[dict[str, Any]]) -> None:
        self.chat = chat
        self.visitors = visitors
        self.examples = examples

    def ask(self, message: dict[str, Any], request: gr.Request) -> tuple[Any, Any, str]:
        """Handle a sent question; return chatbot, text box and pace."""
        visitor = visitor_of(self.visitors, request)
        begin(visitor.session, self.visitors, visitor, message)
        return messages(visitor.session), gr.update(**ASKING), ""

    def example(self, event: gr.SelectData, request: gr.Request) -> tuple[Any, Any, str]:
        """Handle a click on an example; return chatbot, text box and pace."""
        return self.ask(self.examples[event.index], request)

    def again(self, event: gr.RetryData, request: gr.Request) -> tuple[Any, Any, str]:
        """Handle a request to repeat an answer; return chatbot, text box and pace."""
        visitor = visitor_of(self.visitors, request)
        visitor.session.ask_again(_exchange_at(visitor.session, event.index))
        return messages(visitor.session), gr.update(submit_btn=False, stop_btn=True), ""

    def edit(self, event: gr.EditData, request: gr.Request) -> tuple[Any, Any, str]:
        """Handle an edited question; return chatbot, text box and pace."""
        visitor = visitor_of(self.visitors, request)
        place, text = _exchange_at(visitor.session, event.index), plain(str(event.value))
        try:
            _check_length(text)
            visitor.session.ask_again(place, text)
        except InputError as error:
            raise gr.Error(str(error)) from error
        return messages(visitor.session), gr.update(submit_btn=False, stop_btn=True), ""

    def answer(
        self, system: str, temperature: float, length: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any, str]]:
        """Answer the last question; yield chatbot, text box and pace, piece by piece."""
        session = visitor_of(self.visitors, request).session
        if not session.exchanges:
            yield [], gr.update(**WAITING), ""
            return
        exchange = session.exchanges[-1]
        if not exchange.trouble:
            try:
                for _ in session.answer(self.chat, Settings(system, temperature, int(length))):
                    yield messages(session), gr.skip(), ""
            except InputError as error:
                exchange.trouble = str(error)
            except Exception as error:  # the page is the only place where its user can see it
                exchange.trouble = in_words(error)
        yield messages(session), gr.update(**WAITING), exchange.pace

    def stop(self, request: gr.Request) -> tuple[Any, Any]:
        """Handle the stop button: `answer` ends at the next token, or does not begin; return chatbot and text box."""
        session = visitor_of(self.visitors, request).session
        session.stop()
        return messages(session), gr.update(**WAITING)

    def clear(self, request: gr.Request) -> tuple[Any, str]:
        """Start a new conversation and delete the images of the last one; return text box and pace."""
        visitor = visitor_of(self.visitors, request)
        visitor.session.clear()
        visitor.tidy()
        return gr.update(**WAITING), ""


def visitor_of(visitors: Visitors, request: gr.Request) -> Visitor:
    """Return the visitor, or show a message on the page that gives the reason for having none."""
    try:
        return visitors.of(request)
    except InputError as error:
        raise gr.Error(str(error)) from error


def begin(session: Session, visitors: Visitors, visitor: Visitor, message: dict[str, Any]) -> Exchange:
    """Add a question to a session; if it cannot be asked, the exchange has the reason in `trouble`."""
    text, files = message.get("text") or "", [_path(file) for file in message.get("files") or []]
    exchange = session.ask(text[:MAX_QUESTION])
    try:
        exchange.images = visitors.take(visitor, files)
        _check_length(text)
    except InputError as error:
        exchange.trouble = str(error)
    return exchange


def messages(session: Session) -> list[Any]:
    """Return a conversation for Gradio's chatbot: exactly two messages per exchange, so that indices can be mapped."""
    shown: list[Any] = []
    for exchange in session.exchanges:
        shown.append(asked(exchange.question, exchange.images))
        if exchange.trouble:
            shown.append(not_answered(exchange.trouble))
        elif exchange.answer:
            shown.append({"role": "assistant", "content": as_text(exchange.answer)})
        elif exchange.over or exchange is not session.exchanges[-1]:
            shown.append({"role": "assistant", "content": "(stopped)" if exchange.stop.is_set() else NOTHING})
    return shown


def asked(question: str, images: Sequence[Path]) -> dict[str, Any]:
    """Return a question with those of its images that still exist, for Gradio's chatbot."""
    there = [{"path": str(image)} for image in images if image.is_file()]
    return {"role": "user", "content": [*there, as_text(question)]}


def not_answered(trouble: str) -> gr.ChatMessage:
    """Return the message in the place of a missing answer."""
    return gr.ChatMessage(content=as_text(trouble), metadata={"title": TROUBLE})


def in_words(error: Exception) -> str:
    """Return the text for the page about an error; its kind and its whole text are printed in the terminal."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if out_of_memory(error):
        return "There is not enough memory for this question. Start a new conversation, or use fewer images."
    return f"The model failed ({type(error).__name__}). See the terminal of the demo for details."


def as_text(text: str) -> str:
    """Escape tags and entities: Gradio shows HTML in an answer even if it renders no markdown."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def plain(text: str) -> str:
    """Undo `as_text`."""
    return text.replace("&lt;", "<").replace("&amp;", "&")


def _check_length(text: str) -> None:
    if len(text) > MAX_QUESTION:
        raise InputError(
            f"The question has {len(text):,} characters; the limit is {MAX_QUESTION:,}. Shorten the question."
        )


def _exchange_at(session: Session, index: int | tuple[int, int]) -> int:
    """Return the index of the exchange that has a message at this position in the chatbot."""
    place = (index[0] if isinstance(index, list | tuple) else index) // 2
    if not 0 <= place < len(session.exchanges):
        raise gr.Error("This conversation has ended. Start a new one.")
    return place


def _path(file: Any) -> str:
    return str(file["path"] if isinstance(file, dict) else file)

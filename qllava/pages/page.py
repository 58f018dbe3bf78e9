"""Layout of the demo's page, and the handler of each element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape

from qllava.inference import Chat, about, label, limits
from qllava.models.positions import positions_of
from qllava.pages.compare import BUTTONS, Compare
from qllava.pages.talk import Talk
from qllava.pages.visitors import Visitors
from qllava.voting.votes import Verdict, VoteFile

STYLE = Path(__file__).with_name("style.css")
MAX_WAITING = 100
"""Maximum number of waiting questions of all visitors; further ones are refused."""
CHATBOT: dict[str, Any] = {
    "render_markdown": False,
    "allow_tags": False,
    "allow_file_downloads": False,
    "feedback_options": None,
    "layout": "bubble",
}
"""Options of every chatbot: questions and answers are shown as plain text."""
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Drawer:
    """The settings of a tab."""

    system: gr.Textbox
    """System prompt."""
    temperatures: tuple[gr.Slider, ...]
    """Temperature of each model."""
    length: gr.Slider
    """Maximum tokens of an answer."""


def build_page(
    chat: Chat, other: Chat, visitors: Visitors, examples: list[dict[str, Any]], votes: VoteFile, keep: Path | None
) -> gr.Blocks:
    """Return the page for a model, compared with another one or with itself; it is not served yet."""
    page: gr.Blocks
    with gr.Blocks(title="qllava", analytics_enabled=False, fill_height=True) as page:
        gr.HTML(
            f"<header><h1>qllava</h1><p>Ask <b>{escape(label(chat))}</b> about your images. {limits(chat)}</p>"
            "</header>",
            elem_id="head",
        )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat"):
                _chat_tab(Talk(chat, visitors, examples))
            with gr.Tab("Compare"):
                _compare_tab(Compare((chat, other), visitors, votes, keep, examples))
            with gr.Tab("About"):  # a tab covers nothing, even on a phone
                gr.HTML(_card(chat) + (_card(other) if other is not chat else ""), elem_id="card")
        page.unload(visitors.leave)
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def _chat_tab(talk: Talk) -> None:
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height="60vh",
        placeholder=_hint(talk.examples),
        examples=talk.examples or None,  # type: ignore[arg-type]
        editable="user",
        buttons=["copy"],
        **CHATBOT,
    )
    pace = gr.HTML(elem_id="pace")
    textbox = _textbox("question", "Ask about an image")
    warm = talk.chat.recommended.temperature if talk.chat.recommended_sampling else 0.0
    drawer = _drawer(talk.chat, ("Temperature",), (min(warm, 2.0),))
    shown = [chatbot, textbox, pace]
    answer: dict[str, Any] = {
        "fn": talk.answer,
        "inputs": [drawer.system, *drawer.temperatures, drawer.length],
        "outputs": shown,
        **_in_line(pace),
    }
    textbox.submit(talk.ask, [textbox], shown, queue=False, **HIDDEN).success(**answer)
    chatbot.example_select(talk.example, None, shown, queue=False, **HIDDEN).success(**answer)
    chatbot.retry(talk.again, None, shown, queue=False, **HIDDEN).success(**answer)
    chatbot.edit(talk.edit, None, shown, queue=False, **HIDDEN).success(**answer)
    textbox.stop(talk.stop, None, [chatbot, textbox], queue=False, **HIDDEN)
    chatbot.clear(talk.clear, None, [textbox, pace], queue=False, **HIDDEN)
    _camera(textbox)


def _compare_tab(compare: Compare) -> None:
    same = compare.chats[0] is compare.chats[1]
    what = "the model at two temperatures" if same else "two models"
    gr.HTML(
        f"<p>Your question goes to {what}. Their sides are drawn at random for each question and "
        "revealed after your vote.</p>",
        elem_id="told",
    )
    asked = gr.Chatbot(
        elem_id="asked",
        show_label=False,
        label="Question",
        height="auto",
        placeholder=_hint(compare.examples),
        examples=compare.examples or None,  # type: ignore[arg-type]
        buttons=[],
        **CHATBOT,
    )
    with gr.Row(elem_id="sides"):
        left, right = (
            gr.Chatbot(
                elem_id=side,
                label=side.capitalize(),
                height="30vh",
                min_width=140,
                placeholder=f"<p>Answer on the {side}</p>",
                buttons=["copy"],
                **CHATBOT,
            )
            for side in ("left", "right")
        )
    with gr.Row(elem_id="votes"):
        buttons = {
            choice: gr.Button(text, interactive=False, min_width=120, elem_id=f"vote-{choice.replace('_', '-')}")
            for choice, text in BUTTONS.items()
        }
    result = gr.HTML(elem_id="result")
    textbox = _textbox("pair", "Ask both about an image")
    names = ("Temperature of one", "Temperature of the other")
    drawer = _drawer(compare.chats[0], names, (0.0, 0.8 if same else 0.0))
    shown = [asked, left, right, textbox, *buttons.values(), result]
    answer: dict[str, Any] = {
        "fn": compare.answer,
        "inputs": [drawer.system, drawer.length],
        "outputs": shown,
        **_in_line(result),
    }
    textbox.submit(compare.ask, [textbox, *drawer.temperatures], shown, queue=False, **HIDDEN).success(**answer)
    asked.example_select(compare.example, [*drawer.temperatures], shown, queue=False, **HIDDEN).success(**answer)
    textbox.stop(compare.stop, None, shown, queue=False, **HIDDEN)
    for choice, button in buttons.items():
        button.click(_vote(compare, choice), None, shown, queue=False, **HIDDEN)
    _camera(textbox)


def _hint(examples: list[dict[str, Any]]) -> str:
    return f"<h2>Add an image and ask about it{', or try one of these' if examples else ''}.</h2>"


def _in_line(place: gr.HTML) -> dict[str, Any]:
    """Return options for one computation at a time: further questions queue, and their position is shown."""
    return {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "minimal",
        "show_progress_on": place,
        "api_visibility": "private",
    }


def _vote(compare: Compare, choice: Verdict) -> Callable[..., Any]:
    def vote(request: gr.Request) -> Any:
        return compare.vote(choice, request)

    return vote


def _textbox(name: str, placeholder: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        elem_id=name,
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        placeholder=placeholder,
        label="Your question",
        show_label=False,
        stop_btn=False,
        autofocus=name == "question",
        max_plain_text_length=1_000_000,  # Gradio turns longer pasted text into a file
    )


def _drawer(chat: Chat, names: tuple[str, ...], values: tuple[float, ...]) -> Drawer:
    context = positions_of(chat.model.config.get_text_config())
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(
            label="Instructions",
            info="System prompt; models that were trained without one may ignore it.",
        )
        with gr.Row():
            temperatures = tuple(
                gr.Slider(0, 2, value, step=0.1, label=name, info="0: the most likely answer; higher: more varied")
                for name, value in zip(names, values, strict=True)
            )
            length = gr.Slider(
                1,
                context,
                min(512, context),
                step=1,
                label="Longest answer",
                info="In tokens, about 3/4 of a word each",
            )
    return Drawer(system, temperatures, length)


def _camera(textbox: gr.MultimodalTextbox) -> None:
    with gr.Accordion("Camera", open=False):
        camera = gr.Image(
            elem_id=f"{textbox.elem_id}-camera", sources=["webcam"], show_label=False, height=280, buttons=[]
        )

    def taken(image: dict[str, Any] | None, message: dict[str, Any] | None) -> Any:
        if image is None:
            return gr.skip()
        said = message or {}
        return {"text": said.get("text") or "", "files": [*(said.get("files") or []), image]}

    # Gradio must not open the image: it was decoded at its upload, like any other.
    camera.input(taken, [camera, textbox], textbox, queue=False, preprocess=False, postprocess=False, **HIDDEN)


def _card(chat: Chat) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about(chat).items())
    return f"<dl>{rows}</dl>"

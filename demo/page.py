"""The page: what stands where, and which handler each part calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from demo.compare import BUTTONS, Compare
from demo.talk import Talk
from demo.visitors import Visitors
from qllava.data.votes import Verdict, VoteFile
from qllava.inference import Chat, about, label

STYLE = Path(__file__).with_name("style.css")
MAX_WAITING = 1000
"""Questions in line; the next one is told that it is full."""
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class Drawer:
    """The settings of a tab."""

    system: gr.Textbox
    temperatures: tuple[gr.Slider, ...]
    length: gr.Slider


def build_page(
    chat: Chat, other: Chat, visitors: Visitors, examples: list[dict[str, Any]], votes: VoteFile, keep: Path | None
) -> gr.Blocks:
    """The page for a model, compared with another one or with itself; not yet served."""
    page: gr.Blocks
    with gr.Blocks(title="qllava", analytics_enabled=False, fill_height=True) as page:
        gr.HTML(
            f"<header><h1>qllava</h1><p>Ask <b>{escape(label(chat))}</b> about your pictures.</p></header>",
            elem_id="head",
        )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat"):
                _chat_tab(Talk(chat, visitors, examples))
            with gr.Tab("Compare"):
                _compare_tab(Compare((chat, other), visitors, votes, keep))
        with gr.Sidebar(position="right", open=False, width=340, elem_id="card"):
            gr.HTML(_card(chat) + (_card(other) if other is not chat else ""))
        page.unload(visitors.leave)
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def _chat_tab(talk: Talk) -> None:
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height="60vh",
        placeholder="<h3>Add a picture and ask about it.</h3>",
        examples=talk.examples or None,  # type: ignore[arg-type]
        editable="user",
        buttons=["copy"],
        render_markdown=False,  # an answer is text
        allow_tags=False,
        feedback_options=None,
        allow_file_downloads=False,
        layout="bubble",
    )
    pace = gr.HTML(elem_id="pace")
    textbox = _textbox("question", "Ask about your picture: add it with the clip, paste it, or drop it here")
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
        f"<p>Your question goes to {what}. Which one answers on which side is drawn anew each time, and told after "
        "your vote.</p>",
        elem_id="told",
    )
    with gr.Row(elem_id="sides"):
        left, right = (
            gr.Chatbot(
                elem_id=side, label=side.capitalize(), height="40vh", min_width=260, buttons=["copy"],
                render_markdown=False, allow_tags=False, feedback_options=None, layout="bubble",
                allow_file_downloads=False, placeholder="<p>The answer will stand here.</p>",
            )
            for side in ("left", "right")
        )  # fmt: skip
    with gr.Row(elem_id="votes"):
        buttons = {
            choice: gr.Button(text, interactive=False, min_width=120, elem_id=f"vote-{choice.replace('_', '-')}")
            for choice, text in BUTTONS.items()
        }
    result = gr.HTML(elem_id="result")
    textbox = _textbox("pair", "Ask both about your picture")
    names = ("Temperature of one", "Temperature of the other")
    drawer = _drawer(compare.chats[0], names, (0.0, 0.8 if same else 0.0))
    shown = [left, right, textbox, *buttons.values(), result]
    textbox.submit(compare.ask, [textbox, *drawer.temperatures], shown, queue=False, **HIDDEN).success(
        compare.answer, [drawer.system, drawer.length], shown, **_in_line(result)
    )
    textbox.stop(compare.stop, None, shown, queue=False, **HIDDEN)
    for choice, button in buttons.items():
        button.click(_vote(compare, choice), None, shown, queue=False, **HIDDEN)
    _camera(textbox)


def _in_line(place: gr.HTML) -> dict[str, Any]:
    """One computation at a time: the next question waits in line, and its place in it is shown."""
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
        max_plain_text_length=1_000_000,  # Gradio makes a file of what is pasted beyond it
    )


def _drawer(chat: Chat, names: tuple[str, ...], values: tuple[float, ...]) -> Drawer:
    context = chat.model.config.get_text_config().max_position_embeddings
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(
            label="Instructions",
            info="Told to the model before the conversation; models that learned without may not heed them.",
        )
        with gr.Row():
            temperatures = tuple(
                gr.Slider(0, 2, value, step=0.1, label=name, info="0: the likeliest answer; higher: more varied")
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

    def taken(picture: dict[str, Any] | None, message: dict[str, Any] | None) -> Any:
        if picture is None:
            return gr.skip()
        said = message or {}
        return {"text": said.get("text") or "", "files": [*(said.get("files") or []), picture]}

    # Gradio is not to open the picture: it is looked at when its question is asked, as any other.
    camera.input(taken, [camera, textbox], textbox, queue=False, preprocess=False, postprocess=False, **HIDDEN)


def _card(chat: Chat) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about(chat).items())
    return f"<dl>{rows}</dl>"

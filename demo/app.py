"""A chat about pictures in the browser: one model, one process, on this machine only.

    python demo/app.py                                  # the newest finished nano run
    python demo/app.py --model merged --port 7861       # a merged folder, a run folder, a hub name

The page is served on 127.0.0.1 and asks nobody else for anything: no statistics, no fonts, no scripts from elsewhere,
and a policy in every answer of the server that forbids the browser to.
Uploaded pictures lie in a folder of this process and are deleted when it ends.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.inference import Chat, load, user_turn

MAX_NEW_TOKENS = 512
MAX_UPLOAD = "20mb"
TROUBLE = "Not answered"
CSS = """
.gradio-container main { max-width: 56rem !important; width: 100% !important; margin: 0 auto !important; }
#chat .message img { min-width: 8rem; }
#chat .example-image-container, #chat .example-image { width: 6rem; height: 6rem; }
#chat button[aria-label="Share"] { display: none; }  /* it would send the picture to a public website */
"""
# Whatever a model answers or a user pastes (markdown, <img src=...>), the browser loads nothing from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
Respond = Callable[[dict[str, Any], list[dict[str, Any]]], Iterator[Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the model, serve the page until Ctrl-C; returns the exit status."""
    parser = argparse.ArgumentParser(description="Chat about pictures in the browser.")
    parser.add_argument("--model", default="nano", help="nano, a merged folder, a run folder, or a hub name")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (default 7860)")
    options = parser.parse_args(arguments)
    try:
        chat = load(options.model)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the pictures are deleted then, too
    with tempfile.TemporaryDirectory(prefix="qllava-demo-", ignore_cleanup_errors=True) as folder:
        # Gradio reads both when a page is built. Its own default keeps uploads for ever in a folder that all share.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        return serve(chat, options.port, nano_examples(Path(folder)) if options.model == "nano" else [])


def serve(chat: Chat, port: int, examples: list[Any]) -> int:
    """Build the page and serve it until it is interrupted; 1 when the port is taken."""
    import gradio as gr
    from starlette.middleware import Middleware

    font = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]  # plain names: Gradio's themes ask Google for their fonts otherwise
    page = build_page(chat, examples)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            max_file_size=MAX_UPLOAD,
            theme=gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=font, font_mono=mono),
            css=CSS,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(_Policy)]},
        )
    except OSError as error:
        print(f"the page cannot be served on port {port} ({error}): choose another with --port", file=sys.stderr)
        return 1
    return 0


def build_page(chat: Chat, examples: list[Any]) -> Any:
    """The `gr.ChatInterface` around a loaded model, not yet served."""
    import gradio as gr

    return gr.ChatInterface(
        responder(chat),
        multimodal=True,
        title="qllava",
        description=f"`{chat.name}` on {chat.model.device}. Add a picture with the paper clip, paste it, or drop it.",
        chatbot=gr.Chatbot(
            elem_id="chat",
            show_label=False,
            height="65vh",
            placeholder="Add a picture and ask about it.",
            buttons=["copy"],
            render_markdown=False,  # an answer is text
            allow_tags=False,
            feedback_options=None,
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask about the picture",
            show_label=False,
            stop_btn=True,
            autofocus=True,
        ),
        examples=examples or None,
        example_labels=[example["text"] for example in examples] or None,
        cache_examples=False,
        analytics_enabled=False,
        flagging_mode="never",
        concurrency_limit=1,  # one computation at a time: the next question waits in line
        delete_cache=(3600, 24 * 3600),  # uploads can be read by their address as long as they exist
    )


def responder(chat: Chat) -> Respond:
    """The function behind the page: a message and the history in, the growing answer out.

    What goes wrong is said in the chat, in words, and left out of the conversation that the model sees. Gradio's Stop
    closes this generator, which closes `chat.reply`, which ends the computation.
    """
    import gradio as gr

    def respond(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[Any]:
        said = ""
        try:
            turns, pictures = conversation_of(history)
            new = [_path(file) for file in message.get("files") or []]
            turns.append(user_turn(message.get("text") or "", len(new)))
            pieces = chat.reply(Conversation(turns=tuple(turns)), pictures + new, max_new_tokens=MAX_NEW_TOKENS)
            for piece in pieces:
                said += piece
                yield _escape(said)
            if not said:
                yield "(The model answered nothing.)"
        except InputError as error:
            yield gr.ChatMessage(content=f"{error}", metadata={"title": TROUBLE})
        except Exception as error:  # the page is the only place where its reader can learn of it
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            yield gr.ChatMessage(content=f"{type(error).__name__}: {error}", metadata={"title": TROUBLE})

    return respond


def conversation_of(history: list[dict[str, Any]]) -> tuple[list[Turn], list[Path]]:
    """The turns and pictures of a chat so far, without the questions that were not answered.

    Gradio hands in two shapes: from the page, `content` is a list of `{"type": "text" | "file", ...}`; from its
    client, a string or `{"path": ...}`, one message per picture.
    """
    turns: list[Turn] = []
    pictures: list[Path] = []
    texts: list[str] = []
    files: list[Path] = []
    for message in history:
        if message["role"] == "user":
            new_texts, new_files = _content(message["content"])
            texts += new_texts
            files += new_files
            continue
        answer = _unescape("\n".join(_content(message["content"])[0]))
        if texts and answer and (message.get("metadata") or {}).get("title") != TROUBLE:
            turns += [user_turn("\n".join(texts), len(files)), Turn(role="assistant", content=answer)]
            pictures += files
        texts, files = [], []
    return turns, pictures


def nano_examples(folder: Path) -> list[Any]:
    """Three drawn pictures that no training has seen, each with a question about it, as Gradio's examples."""
    from qllava.nano import language, scenes

    rng = random.Random(7)
    examples = []
    for type_ in ("colour", "count", "relation"):
        question = None
        while question is None:  # not every scene allows every type
            scene = scenes.sample_scene(rng, "test")
            question = language.ask(scene, type_, rng)
        path = folder / f"example-{type_}.png"
        scenes.render(scene).save(path)
        examples.append({"text": question.text, "files": [str(path)]})
    return examples


class _Policy:
    """ASGI middleware that adds `POLICY` to every answer of the server."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def _escape(text: str) -> str:
    """Text in which nothing is a tag or an entity: Gradio shows HTML in an answer even where it renders no markdown."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def _unescape(text: str) -> str:
    """`_escape` undone: what the model said."""
    return text.replace("&lt;", "<").replace("&amp;", "&")


def _content(content: Any) -> tuple[list[str], list[Path]]:
    """Texts and files of one message's content, in either of Gradio's shapes."""
    texts: list[str] = []
    files: list[Path] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(part["text"])
        else:
            files.append(_path(part.get("file", part)))
    return texts, files


def _path(file: Any) -> Path:
    return Path(file["path"] if isinstance(file, dict) else file)


if __name__ == "__main__":
    sys.exit(main())

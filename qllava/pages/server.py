"""The command that serves the demo's pages: its flags, its models and the server.

The page is served on 127.0.0.1 and contacts no other server: no statistics, no fonts, no scripts, and a policy in every
answer that forbids the browser to load any. Only the pixels of images are stored, in a folder of this process; they are
shown only to the user who uploaded them, and deleted when their page is closed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qllava.arguments import (
    MODEL_HELP,
    Parser,
    carry_out,
    check_file,
    check_finished,
    check_kept,
    check_written_folder,
    file_path,
    loading_flags,
    looks,
    model_name,
    sampling_flag,
    votes_flag,
)
from qllava.config import NANO, InputError
from qllava.surroundings import prepare_process
from qllava.voting.votes import VoteFile

if TYPE_CHECKING:
    from qllava.inference import Chat

SHARED = """--share: anyone with the public address can use this model until this program ends, and all traffic passes
through a server of Gradio. Images and questions of others reach this machine."""
OPEN = "Without --auth it has no password."


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the models, serve the page until Ctrl-C, and return the exit status."""
    prepare_process()
    return carry_out(_parser().parse_args(arguments), _run)


def _run(options: argparse.Namespace) -> int:
    passwords = read_passwords(options.auth) if options.auth else None
    if options.keep_pictures is not None:
        _make_folder(options.keep_pictures)
    votes = VoteFile(options.votes)
    chat, other = _load_both(options)
    if options.share:
        print(SHARED if passwords else f"{SHARED} {OPEN}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the images are deleted in this case too
    with tempfile.TemporaryDirectory(prefix="qllava-demo-", ignore_cleanup_errors=True) as folder:
        # Read by Gradio when a page is built. By default it keeps uploads forever in a folder shared by all users.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
        os.environ.setdefault("GRADIO_HEARTBEAT_INTERVAL", "2")  # seconds until it detects that a page was closed
        from qllava.pages.uploads import EXAMPLES

        # nano sees 96 x 96 pixels; other towers see more, and a small drawing would be blurred.
        examples = drawn_examples(Path(folder).resolve() / EXAMPLES, 1 if options.model == NANO else 4)
        return serve(chat, other, votes, Path(folder).resolve(), examples, passwords, options)


def serve(
    chat: Chat,
    other: Chat,
    votes: VoteFile,
    folder: Path,
    examples: list[dict[str, Any]],
    passwords: list[tuple[str, str]] | None,
    options: argparse.Namespace,
) -> int:
    """Build the page and serve it until it is interrupted; return the exit status, 1 if the port is in use."""
    import gradio as gr
    from starlette.middleware import Middleware

    from qllava.pages.access import Cookies, Hosts
    from qllava.pages.guard import Guard
    from qllava.pages.page import STYLE, build_page
    from qllava.pages.uploads import MAX_UPLOAD, Uploads
    from qllava.pages.visitors import Visitors

    font = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]  # plain names, because Gradio's themes load fonts from Google otherwise
    uploads, cookies, hosts = Uploads(folder), Cookies(), Hosts(options.port)
    visitors = Visitors(uploads, cookies)
    page = build_page(chat, other, visitors, examples, votes, options.keep_pictures)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=options.port,
            share=options.share,
            auth=passwords,
            ssr_mode=False,
            max_file_size=MAX_UPLOAD,
            theme=gr.themes.Base(primary_hue="teal", neutral_hue="zinc", font=font, font_mono=mono),
            css_paths=STYLE,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, cookies=cookies, hosts=hosts)]},
        )
    except OSError as error:
        print(
            f"The page cannot be served on port {options.port} ({error}). Choose another port with --port.",
            file=sys.stderr,
        )
        return 1
    if page.share_url:
        hosts.share(page.share_url)
    visitors.sweep_for_ever()
    print(f"The page is available at {page.share_url or page.local_url}. Press Ctrl-C to stop.", flush=True)
    try:
        page.block_thread()
    finally:
        visitors.leave_all()
    return 0


def read_passwords(path: Path) -> list[tuple[str, str]]:
    """Read a line `NAME:PASSWORD` for each user of the page; an InputError names a wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Give a text file with lines NAME:PASSWORD.") from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        name, colon, password = line.strip().partition(":")
        if line.strip() and not (name and colon and password):
            raise InputError(f"{path}, line {number}: expected NAME:PASSWORD.")  # the line itself may be a password
        if line.strip() and name in dict(pairs):
            raise InputError(f"{path}, line {number}: the name {name} is listed twice. Remove one of the lines.")
        if line.strip():
            pairs.append((name, password))
    if not pairs:
        raise InputError(f"{path} is empty. Write a line NAME:PASSWORD for each user.")
    return pairs


def drawn_examples(folder: Path, scale: int) -> list[dict[str, Any]]:
    """Draw three images that are in no training data, each with a question about it, as Gradio's examples.

    Args:
        folder: Folder for the images.
        scale: Factor to enlarge nano's images.
    """
    from PIL import Image

    from qllava.nano import language, scenes

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    examples = []
    for type_ in ("colour", "count", "relation"):
        question = None
        while question is None:  # not every scene supports every type
            scene = scenes.sample_scene(rng, "test")
            question = language.ask(scene, type_, rng)
        path = folder / f"{type_}.png"
        drawn = scenes.render(scene)
        drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.LANCZOS).save(path)
        examples.append({"text": question.text, "files": [str(path)]})
    return examples


def _parser() -> Parser:
    parser = Parser(description="Chat about images in the browser.")
    parser.add_argument("--model", metavar="MODEL", type=model_name, default=NANO, help=MODEL_HELP)
    parser.add_argument(
        "--compare", metavar="MODEL", type=model_name, help="a second model (default: the same at two temperatures)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (default: 7860)")
    votes_flag(parser)
    parser.add_argument(
        "--keep-pictures",
        metavar="DIR",
        type=file_path,
        help="folder to save the images of votes in (default: not saved)",
    )
    parser.add_argument(
        "--auth", metavar="FILE", type=file_path, help="require a password; file with lines NAME:PASSWORD"
    )
    parser.add_argument("--share", action="store_true", help="create a public address through Gradio's server")
    loading_flags(parser)
    sampling_flag(parser, "the page's temperature")
    parser.add_argument(
        "--load-in-4bit",
        action=argparse.BooleanOptionalAction,
        help="load the language model in 4 bit, NF4 (default: on CUDA; a run is loaded as trained)",
    )
    looks(
        parser,
        votes=check_kept,
        keep_pictures=check_written_folder,
        auth=check_file,
        model=check_finished,
        compare=check_finished,
    )
    return parser


def _load_both(options: argparse.Namespace) -> tuple[Chat, Chat]:
    """Return the model and the one to compare it with, which is the same if no other is named."""
    from qllava.inference import Loading, load_as, load_pair

    how = Loading(
        load_in_4bit=options.load_in_4bit,
        dtype=options.dtype,
        base_model=tuple(options.base_model),
        recommended_sampling=options.sampling == "recommended",
    )
    if options.compare is not None:
        return load_pair(options.model, options.compare, how)
    chat = load_as(options.model, how)
    return chat, chat


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be used as a folder for images ({error.strerror}). Give another folder."
        ) from error

"""`qllava chat`: a conversation in the terminal.

    you> /image photo.jpg
    you> What is on the table?
    A red cup.

`/image FILE` shows a picture with the next question, `/clear` begins anew, `/quit` (or Ctrl-D) leaves; Ctrl-C stops
the answer, not the program. With a prompt it answers once and returns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.data.images import open_image
from qllava.inference.chat import Chat, user_turn
from qllava.inference.loading import load

HELP = "/image FILE shows a picture with your next question, /clear begins anew, /quit leaves; Ctrl-C stops an answer"


def chat_loop(
    model: str,
    *,
    images: list[Path],
    prompt: str | None,
    load_in_4bit: bool,
    max_new_tokens: int,
    temperature: float,
) -> int:
    """Load the model and talk; returns the exit status. Raises InputError for what cannot be loaded or asked."""
    for image in images:
        open_image(image)  # a wrong file name should not cost the minute that a large model takes to load
    chat = load(model, load_in_4bit=load_in_4bit)
    session = _Session(chat, images, max_new_tokens, temperature)
    if prompt is not None:
        session.ask(prompt)
        return 0
    if sys.stdin.isatty():
        import readline  # noqa: F401  # the import gives `input` line editing and history

        print(f"{chat.name} on {chat.model.device}. {HELP}.")
    while (line := _read_line()) is not None:
        try:
            if not session.handle(line.strip()):
                break
        except InputError as error:  # one question went wrong; the conversation goes on
            print(error, file=sys.stderr)
    return 0


def _read_line() -> str | None:
    """The next line, or None at the end of the input. Ctrl-C at the prompt leaves too, as in other chats."""
    try:
        return input("you> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


class _Session:
    """One conversation: the turns so far, their pictures, and the pictures that wait for the next question."""

    def __init__(self, chat: Chat, images: list[Path], max_new_tokens: int, temperature: float) -> None:
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.turns: tuple[Turn, ...] = ()
        self.shown: list[Path] = []
        self.waiting = list(images)

    def handle(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/clear":
            self.turns, self.shown, self.waiting = (), [], []
        elif command == "/image":
            path = Path(argument.strip().strip("'\"")).expanduser()  # terminals quote a file that is dropped on them
            open_image(path)
            self.waiting.append(path)
        elif command.startswith("/"):
            print(f"unknown command {command}: {HELP}")
        elif line:
            self.ask(line)
        return True

    def ask(self, question: str) -> None:
        """Print the answer as it comes. A question that fails, or is stopped before it said anything, is forgotten."""
        turns = (*self.turns, user_turn(question, len(self.waiting)))
        pictures = self.shown + self.waiting
        answer = _print_pieces(
            self.chat.reply(
                Conversation(turns=turns),
                pictures,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
        )
        if answer:
            self.turns = (*turns, Turn(role="assistant", content=answer))
            self.shown, self.waiting = pictures, []


def _print_pieces(pieces: Iterator[str]) -> str:
    said = ""
    try:
        for piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return said

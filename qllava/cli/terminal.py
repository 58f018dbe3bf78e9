"""`qllava chat`: a conversation in the terminal.

    you> /image photo.jpg
    you> What is on the table?
    A red cup.

`/help` lists the commands. Ctrl-C stops the answer, not the program. With `--prompt`, `qllava chat` answers once and
returns. With a second model, both answer every question in random order without their names, and the user votes.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qllava.config import InputError, expanded
from qllava.data.images import open_image
from qllava.inference.about import about, limits
from qllava.inference.chat import Chat
from qllava.inference.kept_images import hash_of
from qllava.inference.loading import Loading, load_as, load_pair
from qllava.inference.session import Session, Settings
from qllava.models.recommended import recommendation
from qllava.surroundings import user_name
from qllava.voting.duel import Contender, Duel, contenders
from qllava.voting.votes import Verdict, VoteFile

HELP = """/image FILE      show an image with your next question
/again           ask the last question again
/edit TEXT       replace the last question by TEXT
/clear           start a new conversation
/system TEXT     set the system prompt; without TEXT, remove it
/temperature T   set the sampling temperature; 0 is greedy decoding
/sampling WHAT   recommended: the model's own sampling values; asked: only /temperature
/length N        set the maximum number of tokens of an answer
/model           show which model is loaded
/quit            exit (or Ctrl-D); Ctrl-C stops an answer"""
SAMPLING = ("asked", "recommended")
_VOTES: dict[str, Verdict] = {"l": "left", "r": "right", "t": "tie", "b": "both_bad"}


def chat_loop(model: str, how: Loading, *, images: Sequence[Path], prompt: str | None, settings: Settings) -> int:
    """Load the model and run a conversation; return the exit status.

    Raises:
        InputError: If the model or an image cannot be loaded, or the one prompt cannot be answered.
    """
    _look_at(images)
    chat = load_as(model, how)
    terminal = _Terminal(chat, list(images), settings)
    if prompt is not None:
        terminal.ask(prompt)
        return 0
    known = f"\n{limits(chat)}" if limits(chat) else ""
    _greet(f"{chat.name} on {chat.model.device}. /help lists the commands.{known}{_recommends(chat)}")
    _read_lines(terminal.handle)
    return 0


def compare_loop(
    models: tuple[str, str], how: Loading, *, images: Sequence[Path], votes: Path, settings: Settings
) -> int:
    """Load two models (or one twice), ask both every question, store the votes, and return the exit status."""
    _look_at(images)
    file = VoteFile(votes)
    first, second = load_pair(*models, how)
    # The same model twice: compare samples of one model.
    warm = tuple(_temperature(chat, settings) for chat in (first, second))
    cold = 0.0 if second is first else warm[0]
    pair = contenders((first, second), (cold, warm[1]))
    _greet(f"Both models answer every question. Votes are written to {votes}. /image FILE shows an image, /quit exits.")
    _read_lines(_Comparison(pair, list(images), settings, file).handle)
    return 0


def _temperature(chat: Chat, settings: Settings) -> float:
    if settings.temperature is None:
        return chat.recommended.temperature if chat.recommended_sampling else 0.0
    return settings.temperature


def _recommends(chat: Chat) -> str:
    """Return a line for the greeting; empty if the model recommends no sampling values."""
    said = recommendation(chat.model.generation_config)
    if not said:
        return ""
    used = "used" if chat.recommended_sampling else "not used; to use it, type /sampling recommended"
    return f"\nRecommended sampling of the model: {said} ({used})."


def _look_at(images: Iterable[Path]) -> None:
    for image in images:
        open_image(image)  # a wrong file name should not cost the minute that a large model takes to load


def _greet(text: str) -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401  # the import gives `input` line editing and history

        print(text)


def _read_lines(handle: Callable[[str], bool]) -> None:
    """Pass each line to `handle` until it returns False."""
    while (line := _read_line("you> ")) is not None:
        try:
            if not handle(line.strip()):
                break
        except InputError as error:  # one question failed; the conversation continues
            print(error, file=sys.stderr)


def _read_line(prompt: str) -> str | None:
    """Return the next line, or None at the end of the input or on Ctrl-C at the prompt."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _image(argument: str) -> Path:
    path = Path(expanded(argument.strip().strip("'\"")))  # terminals quote a file that is dropped on them
    if not argument.strip() or path.is_dir():
        raise InputError("/image needs the path of an image file.")
    open_image(path)
    return path


class _Terminal:
    """One conversation, the images for the next question, and the sampling settings."""

    def __init__(self, chat: Chat, images: list[Path], settings: Settings) -> None:
        self.chat = chat
        self.session = Session()
        self.waiting = images
        self.settings = settings

    def handle(self, line: str) -> bool:
        """Handle one input line; return False to exit."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/quit":
            return False
        if command == "/image":
            self.waiting.append(_image(argument))
        elif command == "/clear":
            self.session.clear()
            self.waiting = []
        elif command == "/again":
            self.session.ask_again()
            self._answer()
        elif command == "/edit":
            self.session.ask_again(question=argument)
            self._answer()
        elif command in ("/system", "/temperature", "/length", "/sampling"):
            self._set(command, argument)
        elif command == "/model":
            print("\n".join(f"{name:<28}{value}" for name, value in about(self.chat).items()))
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"Unknown command {command}. /help lists the commands.")
        elif line:
            self.ask(line)
        return True

    def ask(self, question: str) -> None:
        """Stream the answer to the terminal; forget a question that fails or is stopped before the first token."""
        self.session.ask(question, self.waiting)
        if self._answer():
            self.waiting = []

    def _answer(self) -> bool:
        exchange, shown = self.session.exchanges[-1], 0
        try:
            for said in self.session.answer(self.chat, self.settings):
                print(said[shown:], end="", flush=True)
                shown = len(said)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            if not exchange.answer:
                self.session.exchanges.remove(exchange)
        print(flush=True)
        if exchange.pace and sys.stdout.isatty():
            print(f"\033[2m{exchange.pace}\033[0m")
        return bool(exchange.answer)

    def _set(self, command: str, argument: str) -> None:
        try:
            if command == "/system":
                self.settings = replace(self.settings, system=argument or None)
            elif command == "/sampling":
                if argument not in SAMPLING:
                    raise InputError(f"/sampling must be {' or '.join(SAMPLING)}, not {argument!r}.")
                self.chat = replace(self.chat, recommended_sampling=argument == "recommended")
                self.settings = replace(self.settings, temperature=None)
            elif command == "/length":
                length = int(argument)
                if length < 1:
                    raise ValueError
                self.settings = replace(self.settings, max_new_tokens=length)
            else:
                temperature = float(argument)
                if not 0 <= temperature < math.inf:
                    raise ValueError
                self.settings = replace(self.settings, temperature=temperature)
        except ValueError:
            least = "a whole number of at least 1" if command == "/length" else "a number of at least 0"
            raise InputError(f"{command} must be {least}, not {argument!r}.") from None


class _Comparison:
    """Blind comparison: both answers, a vote, and then the names."""

    def __init__(
        self, pair: tuple[Contender, Contender], images: list[Path], settings: Settings, votes: VoteFile
    ) -> None:
        self.pair = pair
        self.waiting = images
        self.settings = settings
        self.votes = votes

    def handle(self, line: str) -> bool:
        """Handle one input line; return False to exit."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/image":
            self.waiting.append(_image(argument))
        elif command.startswith("/"):
            print("/image FILE shows an image with the next question, /quit exits")
        elif line:
            self._compare(line)
        return True

    def _compare(self, question: str) -> None:
        duel = Duel(self.pair, random.randrange(2**31))
        growing = duel.answer(
            question,
            self.waiting,
            hashes=[hash_of(image) for image in self.waiting],
            max_new_tokens=self.settings.max_new_tokens,
            system=self.settings.system,
        )
        try:
            for _ in growing:
                pass
        except KeyboardInterrupt:
            print("[stopped]")
            return
        print(f"left:  {duel.answers['left']}\nright: {duel.answers['right']}", flush=True)
        choice = None
        while choice is None:
            said = _read_line("better: l(eft), r(ight), t(ie), b(oth bad), or s(kip)> ")
            if said is None or said.strip().lower()[:1] == "s":
                return
            choice = _VOTES.get(said.strip().lower()[:1])
        self.votes.append(duel.vote(choice, user_name()))
        print(f"left was {duel.contenders['left'].name}, right was {duel.contenders['right'].name}", flush=True)
        self.waiting = []

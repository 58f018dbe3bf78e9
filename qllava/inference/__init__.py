"""Loading models and generating answers about images; used by chat, demo, evaluation and training.

    import qllava
    chat = qllava.load("nano")                      # or a merged model, a run, a hub name
    print(chat.answer("photo.jpg", "What is this?"))

`load` returns a `Chat`, and a `Session` is one user's conversation with it. `answer_prompts` answers
encoded prompts with a loaded model.
"""

from __future__ import annotations

from qllava.inference.about import about, label, limits
from qllava.inference.batches import MOST, Room, attempt
from qllava.inference.chat import Chat
from qllava.inference.generate import answer_prompts
from qllava.inference.given import GivenImage
from qllava.inference.identity import fingerprint_of
from qllava.inference.kept_images import keep_image
from qllava.inference.loading import Loading, load, load_as, load_pair
from qllava.inference.prompts import Prompt, user_turn
from qllava.inference.session import Exchange, Session, Settings

__all__ = [
    "MOST",
    "Chat",
    "Exchange",
    "GivenImage",
    "Loading",
    "Prompt",
    "Room",
    "Session",
    "Settings",
    "about",
    "answer_prompts",
    "attempt",
    "fingerprint_of",
    "keep_image",
    "label",
    "limits",
    "load",
    "load_as",
    "load_pair",
    "user_turn",
]

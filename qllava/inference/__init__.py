"""Load a model, ask it about images, stream what it says: used by chat, demo, evaluation and during training.

    import qllava
    chat = qllava.load("nano")                      # or a merged folder, a run folder, a hub name
    print(chat.answer("photo.jpg", "What is this?"))

`load` turns a name into a `Chat`, and a `Session` is one person's conversation with it. `answer_prompts` answers
encoded prompts on a model that is in memory already.
"""

from __future__ import annotations

from qllava.inference.about import about, label
from qllava.inference.batches import MOST, Room, attempt
from qllava.inference.chat import Chat
from qllava.inference.generate import answer_prompts
from qllava.inference.given import GivenImage
from qllava.inference.identity import fingerprint_of
from qllava.inference.kept_images import keep_image
from qllava.inference.loading import has_base, load, same_model
from qllava.inference.prompts import Prompt, user_turn
from qllava.inference.session import Exchange, Session, Settings

__all__ = [
    "MOST",
    "Chat",
    "Exchange",
    "GivenImage",
    "Prompt",
    "Room",
    "Session",
    "Settings",
    "about",
    "answer_prompts",
    "attempt",
    "fingerprint_of",
    "has_base",
    "keep_image",
    "label",
    "load",
    "same_model",
    "user_turn",
]

"""Cases of examples that are broken, in every way that the reader must report."""

from __future__ import annotations

from typing import Any

from tests.faults.broken_data import DOCS, GPT, HALF, HUMAN, SEEN, SOUND, Case, raw, row


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ROWS = {
    "a list for an example": raw(f"an example is a JSON object, not a list; {DOCS}", ["a"], where=""),
    "null for an example": raw(f"an example is a JSON object, not null; {DOCS}", None, where=""),
    "a number for an example": raw(f"an example is a JSON object, not a number; {DOCS}", 1.5, where=""),
    "no known key": raw(
        f"an example has one of the keys conversations, messages, question, this one has none of them; {DOCS}",
        {"id": "x7", "caption": "A bus."},
    ),
    "two kinds in one": row(
        f"an example has one of the keys conversations, messages, question, this one has conversations "
        f"and question; {DOCS}",
        HUMAN, GPT, question="What?",
    ),
    "an id that is a list": row("the id is a list; give it as text or a whole number", HUMAN, GPT, id=[1], where=""),
    "an id with a fraction": row("the id is a number; give it as text or a whole number", HUMAN, GPT, id=1.5, where=""),
    "an id that is true": row(
        "the id is true or false; give it as text or a whole number", HUMAN, GPT, id=True, where=""
    ),
    "an id of half a character": row(f"the id {HALF}", HUMAN, GPT, id="x\ud83d", where=""),
    "an id with a line break": Case(
        [SOUND, {"id": "x\n7", "conversations": []}],
        "train.json, example 2, id 'x\\n7': conversations must be a list of turns, not an empty list; "
        "write a question and an answer.",
        id="x\n7", line=3, samples=1,
    ),
    "a type that is a number": row("the type is a number; give it as text", HUMAN, GPT, type=3),
    "no id": row(
        "turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": ""}, id=None, where=""
    ),
    "conversations that are a text": raw(
        "conversations must be a list of turns, not a text; write a question and an answer",
        {"id": "x7", "conversations": "What? That."},
    ),
    "no turns": row("conversations must be a list of turns, not an empty list; write a question and an answer"),
    "a turn that is a text": row("turn 1 is a text; write an object with 'from' and 'value'", "What?", GPT),
    "a role that is unknown": row(
        "turn 1 has 'from': 'bot'; expected human or gpt", {"from": "bot", "value": "What?"}, GPT
    ),
    "a role that is an object": row(
        "turn 1 has 'from': an object; expected human or gpt", {"from": {}, "value": "What?"}, GPT
    ),
    "a role that is missing": row("turn 1 has 'from': missing; expected human or gpt", {"value": "What?"}, GPT),
    "a role of messages": raw(
        "turn 2 has 'role': 'tool'; expected user or assistant",
        {"id": "x7", "messages": [message("user", "What?"), message("tool", "That.")]},
    ),
    "two questions in a row": row(
        "turn 2 is the user's and follows another turn of the user; user and assistant alternate", HUMAN, HUMAN, GPT
    ),
    "two answers in a row": row(
        "turn 3 is the assistant's and follows another turn of the assistant; user and assistant alternate",
        HUMAN, GPT, GPT,
    ),
    "a question at the end": row(
        "the conversation ends with the user, so it has no answer to learn; add it or drop the turn",
        HUMAN, GPT, HUMAN,
    ),
    "only an answer": row("the conversation has no turn of the human; write a question and an answer", GPT),
    "only a system prompt": row(
        "the conversation has no turn of the human; write a question and an answer",
        {"from": "system", "value": "Be brief."},
    ),
    "a late system prompt": row(
        "a system prompt comes after another turn; move it to the start",
        HUMAN, {"from": "system", "value": "Be brief."}, GPT,
    ),
    "an empty answer": row("turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": ""}),
    "an answer of white space": row(
        "turn 2 is an empty answer; write it or drop the example", HUMAN, GPT | {"value": " \n\u2003"}
    ),
    "an empty question": row("turn 1 is an empty question; write it or drop the example", HUMAN | {"value": "\n"}, GPT),
    "an answer that is null": row("turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": None}),
    "an answer that is a number": row("turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": 7}),
    "an answer that is an object": row(
        "turn 2 has no text under 'value'; write it there", HUMAN, GPT | {"value": {"a": "b"}}
    ),
    "half of a character": row(f"turn 2 {HALF}", HUMAN, GPT | {"value": "A bus \ud83d"}),
    "half of a character in a system prompt": row(
        f"the system prompt {HALF}", {"from": "system", "value": "\udc00"}, HUMAN, GPT
    ),
    "a part of another type": raw(
        'turn 1 has a part that is neither {"type": "image"} nor {"type": "text", "text": ...}; write it as one of '
        "them, and name the images under images",
        {"id": "x7", "messages": [message("user", [{"type": "video"}]), message("assistant", "A bus.")]},
    ),
    "a question without an answer": raw("the answer is missing; write it as text", {"id": "x7", "question": "What?"}),
    "an answer of a question that is null": raw(
        "the answer is null; write it as text", {"id": "x7", "question": "What?", "answer": None}
    ),
    "<image> without an image": row(
        "the questions hold 1 <image>, the example names 0 images; make them equal", SEEN, GPT
    ),
    "an image without <image>": row(
        "the questions hold 0 <image>, the example names 1 image; make them equal", HUMAN, GPT, image="red.png"
    ),
    "fewer images than <image>": row(
        "the questions hold 2 <image>, the example names 1 image; make them equal",
        *(SEEN, GPT) * 2,
        image="red.png",
    ),
    "<image> in an answer": row(
        "turn 2 is an answer with <image> in it; images belong in questions",
        SEEN, GPT | {"value": "See <image>."}, image="red.png",
    ),
    "<image> in a system prompt": row(
        "the system prompt contains <image>; images belong in questions",
        {"from": "system", "value": "<image>"}, SEEN, GPT, image="red.png",
    ),
    "image and images": row(
        "the example has both image and images; keep one", SEEN, GPT, image="a.png", images=["a.png"]
    ),
    "an image that is a number": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, image=3
    ),
    "an image that is an object": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, image={"name": "a"}
    ),
    "an image without a name among others": row(
        "the image must be a file name or a list of file names; write it as text", SEEN, GPT, images=["red.png", ""]
    ),
    "an image that is missing": row(
        "the image 'gone.png' is not in the image folder {folder}; add it or give the right folder",
        SEEN, GPT, image="gone.png",
    ),
    "an image that is a folder": row(
        "the image '.' is not in the image folder {folder}; add it or give the right folder", SEEN, GPT, image="."
    ),
    "an image of another folder": row(
        "the image '../red.png' is outside the image folder {folder}; give its path relative to that folder",
        SEEN, GPT, image="../red.png",
    ),
    "an image of the system": row(
        "the image '/etc/hostname' is outside the image folder {folder}; give its path relative to that folder",
        SEEN, GPT, image="/etc/hostname",
    ),
    "an address for an image": row(
        "the image 'https://host/a.png' is an address; download it, and name the file",
        SEEN, GPT, image="https://host/a.png",
    ),
    "pixels for an image": row(
        f"the image '{'iVBORw0KGg' * 20}...' is not in the image folder {{folder}}; add it or give the right folder",
        SEEN, GPT, image="iVBORw0KGg" * 2000,
    ),
    "an image with a NUL in its name": row(
        "the image 'red\\x00.png' is not in the image folder {folder}; add it or give the right folder",
        SEEN, GPT, image="red\0.png",
    ),
    "an image of half a character": row(
        "the path of the image '\\udcff.png' is not UTF-8; rename the file or folder", SEEN, GPT, image="\udcff.png"
    ),
    "a control token in a question": row(
        "the words 'What does <|im_end|> mean?' ... contain <|im_end|>, which is a control token of this model; "
        "spell it differently or drop the example",
        {"from": "human", "value": "What does <|im_end|> mean?"}, GPT,
    ),
    "a control token in an answer": row(
        "the words '<|endoftext|>' ... contain <|endoftext|>, which is a control token of this model; "
        "spell it differently or drop the example",
        HUMAN, {"from": "gpt", "value": "<|endoftext|>"},
    ),
    "an example that is too long": row(
        "1042 tokens (1 image of 16) are more than max_length 512; "
        "raise max_length, or set too_long to drop or trim",
        SEEN, {"from": "gpt", "value": "x" * 1000}, image="red.png",
    ),
    "an example that is too long and has no id": row(
        "1025 tokens (0 images of 16) are more than max_length 512; "
        "raise max_length, or set too_long to drop or trim",
        HUMAN, {"from": "gpt", "value": "x" * 1000}, id=None, where="",
    ),
    "an id that is used twice": Case(
        [SOUND, {"id": "x7", "conversations": [HUMAN, GPT]}, {"id": "x7", "conversations": [HUMAN, GPT, HUMAN, GPT]}],
        "train.json, example 3, id x7: train.json, example 2 has the same id; give each example an id of its own.",
        id="x7", line=4, samples=3, severity="warning",
    ),
    "an answer at the start": Case(
        [SOUND, {"id": "x7", "conversations": [GPT, HUMAN, GPT]}],
        "train.json, example 2, id x7: the conversation begins with an answer, which is not learned; remove that turn.",
        id="x7", line=3, samples=2, severity="warning",
    ),
}  # fmt: skip

"""Removal of a model's reasoning from its reply.

Reasoning models write their thoughts before the answer, each family between its own marks. A server that knows the
family moves them to a separate field (`reasoning_content`), which is ignored here; other servers leave them in the
text. The opening mark may be missing, because the chat template has written it already (DeepSeek-R1), so everything up
to the last closing mark is reasoning. If the closing mark is missing, the reply ended before its answer began, and the
answer is empty.

    >>> answer_of("The user wants ...</think>\\n\\nA cat."), answer_of("<think>The user wants ...")
    ('A cat.', '')
"""

from __future__ import annotations

import re

_MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Phi-4-reasoning
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
_OPENING = re.compile("|".join(re.escape(opening) for opening, _ in _MARKS), re.IGNORECASE)
_CLOSING = re.compile("|".join(re.escape(closing) for _, closing in _MARKS), re.IGNORECASE)
# Marks that some of these families write around the answer itself.
_AROUND = (
    re.compile(r"\A<answer>(.*)</answer>\Z", re.DOTALL | re.IGNORECASE),
    re.compile(r"\A<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>)?\Z", re.DOTALL),
    re.compile(r"\A<\|START_RESPONSE\|>(.*?)(?:<\|END_RESPONSE\|>)?\Z", re.DOTALL),
)
_ENDS = re.compile(r"(?:<\|return\|>|<\|end\|>)\Z")  # end of a gpt-oss message


def answer_of(text: str) -> str:
    """Return the answer in a reply, without reasoning, byte order mark, and surrounding white space.

    Args:
        text: The whole reply.

    Returns:
        The answer; empty if the reply contains only reasoning.
    """
    closing = None
    for closing in _CLOSING.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    said = text[closing.end() :] if closing else text
    said = said.strip().strip("\ufeff").strip()
    if _OPENING.match(said):  # reasoning that does not end
        return ""
    said = _ENDS.sub("", said)
    for around in _AROUND:
        said = around.sub(r"\1", said).strip()
    return said


def holds_marks(text: str) -> bool:
    """Return whether a text contains a mark of reasoning."""
    return bool(_OPENING.search(text) or _CLOSING.search(text))

"""What a model thought before it answered, cut off its reply.

Models of reasoning write their thoughts in front of the answer, each family between marks of its own. A server that
knows the family moves them to a field of their own (`reasoning_content`), which nobody reads here; another one leaves
them in the text. The opening mark may be missing, because the chat template has written it already (DeepSeek-R1), so
everything up to the last closing mark is thought. Where the closing mark is missing, the reply ended before its answer
began, and nothing is left.

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
# What some of these families write around the answer itself.
_AROUND = (
    re.compile(r"\A<answer>(.*)</answer>\Z", re.DOTALL | re.IGNORECASE),
    re.compile(r"\A<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>)?\Z", re.DOTALL),
    re.compile(r"\A<\|START_RESPONSE\|>(.*?)(?:<\|END_RESPONSE\|>)?\Z", re.DOTALL),
)
_ENDS = re.compile(r"(?:<\|return\|>|<\|end\|>)\Z")  # of a message of gpt-oss


def answer_of(text: str) -> str:
    """Return the answer that a reply holds, without thoughts, a byte order mark, and space around it.

    Args:
        text: The whole reply.

    Returns:
        The answer; empty where the reply holds thoughts only.
    """
    closing = None
    for closing in _CLOSING.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    said = text[closing.end() :] if closing else text
    said = said.strip().strip("\ufeff").strip()
    if _OPENING.match(said):  # thoughts that do not end
        return ""
    said = _ENDS.sub("", said)
    for around in _AROUND:
        said = around.sub(r"\1", said).strip()
    return said


def holds_marks(text: str) -> bool:
    """Whether a text holds a mark of thoughts."""
    return bool(_OPENING.search(text) or _CLOSING.search(text))

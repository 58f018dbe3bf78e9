"""Templates: the text, what is learned of it, and the chat template that says the same."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from qllava.conversation import (
    CHATML,
    IMAGE_TOKEN,
    LLAMA_2,
    LLAMA_3,
    PLAIN,
    TEMPLATES,
    VICUNA_V1,
    Conversation,
    Template,
    Turn,
    ask,
    joined,
)
from tests.tiny_models import make_tiny_tokenizer

TWO_ROUNDS = Conversation(
    (
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A red bus."),
        Turn("user", "Where?"),
        Turn("assistant", "Here."),
    )
)
CAPTION = Conversation((Turn("user", "<image>\nDescribe it."), Turn("assistant", "A red bus.")))


def learned(template: Template, conversation: Conversation) -> list[str]:
    rendered = template.render(conversation)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_templates_are_known_by_name() -> None:
    assert list(TEMPLATES) == ["plain", "vicuna_v1", "llama_2", "llama_3", "chatml"]
    assert all(template.name == name for name, template in TEMPLATES.items())


def test_chatml() -> None:
    rendered = CHATML.render(TWO_ROUNDS)
    assert rendered.text == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA red bus.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nHere.<|im_end|>\n"
    )
    assert learned(CHATML, TWO_ROUNDS) == ["A red bus.<|im_end|>", "Here.<|im_end|>"]


def test_chatml_with_a_system_prompt() -> None:
    text = CHATML.render(Conversation(CAPTION.turns, "Be brief.")).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>")


def test_llama_3() -> None:
    assert LLAMA_3.render(CAPTION).text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nDescribe it.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA red bus.<|eot_id|>"
    )
    assert learned(LLAMA_3, CAPTION) == ["A red bus.<|eot_id|>"]


def test_vicuna() -> None:
    text = VICUNA_V1.render(TWO_ROUNDS).text
    assert text.startswith("<s>A chat between")
    assert text.endswith(
        "questions. USER: <image>\nWhat is it? ASSISTANT: A red bus.</s>USER: Where? ASSISTANT: Here.</s>"
    )
    assert learned(VICUNA_V1, TWO_ROUNDS) == [" A red bus.</s>", " Here.</s>"]


def test_llama_2_puts_the_system_prompt_into_the_first_question() -> None:
    text = LLAMA_2.render(Conversation(TWO_ROUNDS.turns, "Be brief.")).text
    assert text == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A red bus. </s>"
        "<s>[INST] Where? [/INST] Here. </s>"
    )
    assert learned(LLAMA_2, TWO_ROUNDS) == [" A red bus. </s>", " Here. </s>"]


def test_plain_keeps_of_the_question_only_the_image() -> None:
    assert PLAIN.render(CAPTION).text == "<s><image>A red bus.\n"
    assert learned(PLAIN, CAPTION) == ["A red bus.\n"]


def test_begin_and_end_of_text_are_the_tokenizers_own_but_not_in_what_is_said() -> None:
    said = Conversation((Turn("user", "What is <s>?"), Turn("assistant", "A tag; </s> ends it.")), "")
    rendered = VICUNA_V1.render(said, bos="[B]", eos="[E]")
    assert rendered.text == "[B]USER: What is <s>? ASSISTANT: A tag; </s> ends it.[E]"
    assert [rendered.text[start:end] for start, end in rendered.contents] == ["What is <s>?", "A tag; </s> ends it."]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_a_generation_prompt_is_the_text_up_to_the_span(template: Template) -> None:
    """What is learned after the prompt in training is what the model must say after it in use."""
    rendered = template.render(CAPTION)
    prompt = template.render(Conversation(CAPTION.turns[:1]), generation_prompt=True)
    assert prompt.text == rendered.text[: rendered.spans[0][0]]
    assert prompt.spans == ()


@pytest.mark.parametrize("template", [t for t in TEMPLATES.values() if t is not PLAIN], ids=lambda t: t.name)
def test_fewer_rounds_are_a_prefix(template: Template) -> None:
    """Trimming and shared prefixes lean on it."""
    assert template.render(TWO_ROUNDS).text.startswith(template.render(Conversation(TWO_ROUNDS.turns[:2])).text)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "no turns"),
        ((Turn("assistant", "a"),), "turn 1 is the assistant's"),
        ((Turn("user", "a"), Turn("user", "b")), "turn 2 is the user's and follows another"),
        ((Turn("system", "a"),), "role 'system'"),  # type: ignore[arg-type]
    ],
)
def test_turns_alternate(turns: tuple[Turn, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conversation(turns)


def test_the_last_turn_decides_what_can_be_rendered() -> None:
    with pytest.raises(ValueError, match="no answer to learn"):
        CHATML.render(Conversation(CAPTION.turns[:1]))
    with pytest.raises(ValueError, match="nothing to answer"):
        CHATML.render(CAPTION, generation_prompt=True)


def test_plain_refuses_what_is_no_caption() -> None:
    with pytest.raises(ValueError, match="an image and its caption"):
        PLAIN.render(TWO_ROUNDS)
    with pytest.raises(ValueError, match="an image and its caption"):
        PLAIN.render(Conversation((Turn("user", "Hi"), Turn("assistant", "Hello"))))


def test_ask() -> None:
    assert ask("What? ", 2) == "<image>\n<image>\nWhat?"
    assert ask("", 1) == "<image>"
    assert ask(" What?", 0) == " What?"


def bpe_tokenizer() -> PreTrainedTokenizerBase:
    """A small byte-level BPE that has the control tokens of every template."""
    tokenizer = make_tiny_tokenizer()
    controls = [control for template in TEMPLATES.values() for control in template.controls]
    tokenizer.add_tokens(controls, special_tokens=True)
    return tokenizer


CONVERSATIONS = {
    "two_rounds": TWO_ROUNDS,
    "system": Conversation(TWO_ROUNDS.turns, 'Say "yes" or \\no.\n'),
    "no_system": Conversation(TWO_ROUNDS.turns, ""),
    "white_space": Conversation((Turn("user", "  <image>\n Hm? "), Turn("assistant", " \n{{ messages }} é 😀 "))),
}


def messages_of(conversation: Conversation, parts: bool) -> list[dict[str, object]]:
    """The conversation as transformers takes it, contents as text or as lists of parts."""
    messages: list[dict[str, object]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        text = turn.content.replace(f"{IMAGE_TOKEN}\n", "")
        content = [{"type": "text", "text": text}, *[{"type": "image"}] * turn.content.count(IMAGE_TOKEN)]
        messages.append({"role": turn.role, "content": content if parts else turn.content})
    return messages


def assert_chat_template_agrees(
    template: Template, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, parts: bool
) -> None:
    """Same text and ids as `render`, and the generation marks cover what is learned."""
    tokens = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
    rendered = template.render(conversation, **tokens)
    messages, source = messages_of(conversation, parts), template.chat_template()
    assert tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False) == rendered.text
    out = tokenizer.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert out["input_ids"] == expected["input_ids"]
    assert out["assistant_masks"] == [
        int(any(first <= start < last for first, last in rendered.spans)) for start, _ in expected["offset_mapping"]
    ]
    prompt = template.render(
        Conversation(conversation.turns[:-1], conversation.system), generation_prompt=True, **tokens
    )
    asked = tokenizer.apply_chat_template(
        messages[:-1], chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert asked == prompt.text


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_3, VICUNA_V1], ids=lambda t: t.name)
def test_chat_template_on_a_byte_level_bpe(template: Template, name: str) -> None:
    assert_chat_template_agrees(template, bpe_tokenizer(), CONVERSATIONS[name], parts=False)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", [VICUNA_V1, LLAMA_2], ids=lambda t: t.name)
def test_chat_template_on_sentencepiece(
    template: Template, name: str, sentencepiece_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert_chat_template_agrees(template, sentencepiece_tokenizer, CONVERSATIONS[name], parts=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, VICUNA_V1, LLAMA_2], ids=lambda t: t.name)
def test_chat_template_takes_contents_as_parts(template: Template) -> None:
    assert_chat_template_agrees(template, bpe_tokenizer(), TWO_ROUNDS, parts=True)


@pytest.mark.parametrize("parts", [False, True])
def test_chat_template_of_captions(parts: bool, sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    assert_chat_template_agrees(PLAIN, sentencepiece_tokenizer, CAPTION, parts=parts)
    assert_chat_template_agrees(PLAIN, bpe_tokenizer(), CAPTION, parts=parts)


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="unknown role tool"):
        bpe_tokenizer().apply_chat_template(
            [{"role": "tool", "content": "a"}], chat_template=CHATML.chat_template(), tokenize=False
        )


INTERLEAVED: dict[str, list[str | None]] = {
    "words_around": ["Is", None, "darker than", None, "?"],
    "first": [None, None, "Which is darker?"],
    "first_and_later": [None, "This one,", None, "or (", None, ")?"],
    "last": ["Compare", None, None],
    "one_inside": ["Is", None, "red?"],
    "one_first": [None, "\n Is it red?"],
    "texts": ["Is it", "red", "?", " Or", " blue?"],
    "no_image": [" What?"],
    "blank": [None, " ", None, "Which?", "", None],
    "chinese": ["这张", None, "比", None, "更暗吗?"],
    "quotes": ['Is "', None, '" or', None, "'s twin it?"],
}


def test_joined_parts_keep_their_order_and_their_words_apart() -> None:
    assert {name: joined(parts) for name, parts in INTERLEAVED.items()} == {
        "words_around": "Is <image> darker than <image>?",
        "first": "<image>\n<image>\nWhich is darker?",
        "first_and_later": "<image>\nThis one, <image> or (<image>)?",
        "last": "Compare <image> <image>",
        "one_inside": "<image>\nIs red?",
        "one_first": "<image>\nIs it red?",
        "texts": "Is it red? Or blue?",
        "no_image": " What?",
        "blank": "<image>\n <image>\nWhich? <image>",
        "chinese": "这张<image>比<image>更暗吗?",
        "quotes": 'Is " <image> " or <image>\'s twin it?',
    }


@pytest.mark.parametrize("name", INTERLEAVED)
@pytest.mark.parametrize("template", [CHATML, LLAMA_3, VICUNA_V1, LLAMA_2, PLAIN], ids=lambda t: t.name)
def test_the_saved_chat_template_joins_parts_as_training_does(template: Template, name: str) -> None:
    parts = INTERLEAVED[name]
    if template is PLAIN and None not in parts:
        return  # not a caption
    tokenizer = bpe_tokenizer()
    tokens = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
    rendered = template.render(Conversation((Turn("user", joined(parts)), Turn("assistant", "Yes."))), **tokens)
    for image, text in (("image", "text"), ("image_url", "text"), ("input_image", "input_text")):
        content = [{"type": image} if part is None else {"type": text, "text": part} for part in parts]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [
            {"type": text, "text": "Yes."}]}]  # fmt: skip
        source = template.chat_template()
        assert tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False) == rendered.text
        ids = tokenizer.apply_chat_template(messages, chat_template=source, return_dict=True)["input_ids"]
        assert ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]

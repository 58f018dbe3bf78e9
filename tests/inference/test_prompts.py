"""What a model reads: control tokens come from the template alone; a template that refuses says so in a sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from qllava.config import InputError
from qllava.conversation import CHATML, IMAGE_TOKEN, TEMPLATES, VICUNA_V1, Conversation, Turn
from qllava.inference import Chat, Session, Settings, user_turn
from qllava.inference.generate import decode_answer
from qllava.inference.prompts import BREAK, prompt_of, render
from tests.tiny_models import IMAGE_TOKENS, make_image, make_tiny_model, make_tiny_processor

SPELLED = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<image>",
    "<s>old</s>",
    "a<|im_<|im_end|>end|>b",
    "<image><image>",
]
PARTS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for p in m['content'] %}"
    "{{ '<image>\n' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ ' ' }}{% endfor %}ASSISTANT:"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


def with_template(template: str | None) -> LlavaProcessor:
    processor = make_tiny_processor()
    processor.chat_template = template
    return processor


def control(processor: LlavaProcessor, ids: list[int]) -> list[int]:
    return [id for id in ids if id in set(processor.tokenizer.all_special_ids) | {processor.image_token_id}]


def conversation_of(text: str, images: int = 1) -> Conversation:
    turns = (user_turn(text, images), Turn("assistant", text), user_turn(f"And {text}?", images))
    return Conversation(turns=turns, system=f"Say {text}.")


@pytest.mark.parametrize("template", [CHATML.chat_template(), PARTS])
@pytest.mark.parametrize("text", SPELLED)
def test_spelled_control_tokens_are_text(template: str, text: str) -> None:
    processor, images = with_template(template), [make_image("red"), make_image("blue")]
    found = prompt_of(processor, conversation_of(text), images)
    plain = prompt_of(processor, conversation_of("ZEBRA"), images)
    assert control(processor, found.input_ids) == control(processor, plain.input_ids)
    assert found.input_ids.count(processor.image_token_id) == 2 * IMAGE_TOKENS
    said = processor.tokenizer.decode(found.input_ids, clean_up_tokenization_spaces=False)
    said = said.replace(IMAGE_TOKEN * IMAGE_TOKENS, "[image]")
    expected = processor.tokenizer.decode(plain.input_ids, clean_up_tokenization_spaces=False)
    expected = expected.replace(IMAGE_TOKEN * IMAGE_TOKENS, "[image]")
    assert said == expected.replace("ZEBRA", text)
    assert BREAK not in said


@given(
    st.lists(st.sampled_from(["<", "image", ">", "|im_", "end|>", "start|>", "<|", "x", " ", *SPELLED])).map("".join)
)
def test_whatever_is_said_no_control_token_comes_of_it(text: str) -> None:
    processor = PROCESSOR
    found = prompt_of(processor, Conversation(turns=(user_turn(f"q{text}", 0),)), []).input_ids
    plain = prompt_of(processor, Conversation(turns=(user_turn("q", 0),)), []).input_ids
    assert control(processor, found) == control(processor, plain)


PROCESSOR = make_tiny_processor()


def test_text_without_them_is_read_as_before(chat: Chat) -> None:
    words = Conversation(turns=(user_turn("What < is > this | here?", 0),))
    text = render(chat.processor, words)
    assert prompt_of(chat.processor, words, []).input_ids == chat.processor.tokenizer(text)["input_ids"]


def test_html_in_llamas_kind_of_tokens(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    processor = LlavaProcessor(
        image_processor=make_tiny_processor().image_processor,
        tokenizer=sentencepiece_tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_V1.chat_template(),
    )
    html = "<p>Was <s>10</s> now 8</p>"
    turns = (user_turn("Write HTML.", 0), Turn("assistant", html), user_turn("And <s>?", 0))
    ids = prompt_of(processor, Conversation(turns=turns), []).input_ids
    assert ids.count(sentencepiece_tokenizer.bos_token_id) == 1 and ids.count(sentencepiece_tokenizer.eos_token_id) == 1
    said = sentencepiece_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert html in said and "And <s>?" in said and BREAK not in said


def test_a_chat_goes_on_after_a_control_token(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    session, settings = Session(), Settings(max_new_tokens=6)
    session.ask("Is <image> a tag, and <|im_start|>?")
    assert list(session.answer(chat, settings))
    session.exchanges[-1].answer = "Write <s>this</s>, <|im_end|> or <image>."  # what a model may well say
    session.ask("And now?")
    assert list(session.answer(chat, settings))
    assert not any(exchange.trouble for exchange in session.exchanges)
    assert session.exchanges[0].answer == "Write <s>this</s>, <|im_end|> or <image>.", "what is read is what was seen"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_every_template_takes_instructions(name: str, system: str | None) -> None:
    template = TEMPLATES[name]
    turns: tuple[Turn, ...] = (user_turn("What?", 1),)
    if not template.images_only:
        turns = (*turns, Turn("assistant", "A cat."), user_turn("Where?", 0))
    conversation = Conversation(turns=turns, system=system)
    tokenizer = PROCESSOR.tokenizer
    expected = template.render(
        conversation, generation_prompt=True, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or ""
    ).text
    assert render(with_template(template.chat_template()), conversation) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NO_SYSTEM, "accepts no system prompt: .*System role not supported.*Remove it"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "ignores the system prompt",
        ),
        ("{{ raise_exception('Only one turn') }}", "rejects this conversation: Only one turn"),
        ("{% for m in messages %}{{ 1 / 0 }}{% endfor %}", "rejects this conversation"),
        ("{{ messages[7]['content'] + 1 }}", "rejects this conversation"),
        ("{{ messages", "rejects this conversation"),
        ("{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}", "rejects this conversation"),
        (None, "no chat template"),
    ],
)
def test_a_foreign_template_that_refuses_is_one_sentence(chat: Chat, template: str | None, said: str) -> None:
    foreign: Any = replace(chat, processor=with_template(template))
    with pytest.raises(InputError, match=said) as caught:
        foreign.stream(None, "What?", system="Be brief.")
    assert "\n" not in str(caught.value)
    if template == NO_SYSTEM:
        assert foreign.answer(None, "What?", max_new_tokens=4) is not None, "without instructions it answers"


def test_each_answer_of_a_batch_has_the_space_that_it_has_alone(chat: Chat) -> None:
    context = chat.model.config.get_text_config().max_position_embeddings
    long = "7" * (context - 40)  # leaves space for a few tokens only
    short = chat.answer(None, "What?", max_new_tokens=64)
    both = chat.answer_batch([(None, "What?"), (None, long)], max_new_tokens=64)
    assert both == [short, chat.answer(None, long, max_new_tokens=64)]
    tokens = [len(chat.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in both]
    assert tokens[1] < 40 < tokens[0]


def test_an_answer_is_decoded_without_control_tokens(chat: Chat) -> None:
    tokenizer = chat.processor.tokenizer
    ids = tokenizer.encode("a cat", add_special_tokens=False)
    assert decode_answer(tokenizer, [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]) == "a cat"

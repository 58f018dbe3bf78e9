"""Asking a tiny random LLaVA: prompts as they were learned, streams that can be stopped, errors in words."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qllava.config import InputError
from qllava.conversation import CHATML, Conversation, Turn
from qllava.data.encode import Encoder
from qllava.inference import Chat, user_turn
from tests.tiny_models import (
    IMAGE_LAYOUT,
    IMAGE_TOKENS,
    make_image,
    make_tiny_llava,
    make_tiny_model,
    make_tiny_processor,
)

LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


def worker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "qllava-generate"]


def test_prompt_is_what_training_encodes(chat: Chat) -> None:
    conversation = Conversation(turns=(user_turn("What colour?", 1),), system="Be brief.")
    prompt = chat.prompt(conversation, [make_image("red")])
    encoder = Encoder(chat.processor.tokenizer, CHATML, chat.processor.image_token_id, IMAGE_LAYOUT)
    assert prompt.input_ids == encoder.encode_prompt(conversation, images=1)
    assert prompt.pixel_values is not None and prompt.pixel_values.shape == (1, 3, 32, 32)


def test_equals_plain_transformers_in_a_loaded_folder(chat: Chat, tmp_path: Path) -> None:
    folder = make_tiny_llava(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=make_image("blue"), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert expected
    assert chat.answer(make_image("blue"), "How many?", max_new_tokens=12) == expected


def test_llava_hf_templates_get_parts(chat: Chat) -> None:
    processor = make_tiny_processor()
    processor.chat_template = LLAVA_HF_TEMPLATE
    prompt = Chat(chat.model, processor, "hf").prompt(Conversation(turns=(user_turn("Why?", 1),)), [make_image("red")])
    text = "USER: " + "<image>" * IMAGE_TOKENS + "\nWhy? ASSISTANT:"
    assert prompt.input_ids == processor.tokenizer.encode(text, add_special_tokens=False)


def test_images_from_files_memory_and_several_at_once(chat: Chat, tmp_path: Path) -> None:
    make_image("green").save(tmp_path / "green.png")
    from_file = chat.answer(tmp_path / "green.png", "Which?", max_new_tokens=8)
    assert from_file == chat.answer(str(tmp_path / "green.png"), "Which?", max_new_tokens=8)
    assert from_file == chat.answer(make_image("green"), "Which?", max_new_tokens=8)
    red_then_green = chat.answer([make_image("red"), make_image("green")], "Which?", max_new_tokens=8)
    green_then_red = chat.answer([make_image("green"), make_image("red")], "Which?", max_new_tokens=8)
    assert red_then_green != green_then_red
    assert chat.answer(None, "Which?", max_new_tokens=8) != from_file


def test_pieces_joined_are_the_answer(chat: Chat) -> None:
    pieces = list(chat.stream(make_image("red"), "What is it?", max_new_tokens=40))
    assert len(pieces) > 3
    assert "".join(pieces) == chat.answer(make_image("red"), "What is it?", max_new_tokens=40)


def test_batched_equals_single(chat: Chat) -> None:
    pairs: list[Any] = [
        (make_image("red"), "Short?"),
        (None, "A question without an image, and rather a long one at that, so that the padding differs"),
        ([make_image("blue"), make_image("yellow")], "Two images?"),
        (make_image("green", (64, 20)), "What colour is the circle?"),
        (make_image("red"), "Another question of some length about the same image?"),
    ]
    single = [chat.answer(images, question, max_new_tokens=16) for images, question in pairs]
    assert len(set(single)) == len(single)
    assert chat.answer_batch(pairs, max_new_tokens=16, batch_size=3) == single


def test_closing_the_stream_ends_the_computation(chat: Chat) -> None:
    stream = chat.stream(None, "Talk for a long time", max_new_tokens=400)
    next(stream)
    assert len(worker_threads()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not worker_threads()


def test_an_error_in_the_thread_reaches_the_reader(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(chat.model, "generate", fail)
    with pytest.raises(RuntimeError, match="the card fell out"):
        list(chat.stream(None, "Hello?"))
    assert not worker_threads()


def test_reply_reads_the_whole_conversation(chat: Chat) -> None:
    turns = (user_turn("What is it?", 1), Turn("assistant", "A circle."), user_turn("And this?", 1))
    red, blue = make_image("red"), make_image("blue")
    said = "".join(chat.reply(Conversation(turns=turns), [red, blue], max_new_tokens=8))
    swapped = "".join(chat.reply(Conversation(turns=turns), [blue, red], max_new_tokens=8))
    assert said != swapped
    assert chat.complete([chat.prompt(Conversation(turns=turns), [red, blue])], max_new_tokens=8) == [said]


def test_sampling_differs_from_call_to_call_and_greedy_does_not(chat: Chat) -> None:
    sampled = {chat.answer(None, "Say something", max_new_tokens=12, temperature=3.0) for _ in range(4)}
    greedy = {chat.answer(None, "Say something", max_new_tokens=12) for _ in range(2)}
    assert len(sampled) > 1 and len(greedy) == 1


def test_an_empty_question(chat: Chat) -> None:
    for ask in (chat.answer, chat.stream):
        with pytest.raises(InputError, match="question is empty"):
            ask(None, "  ")


def test_bad_images(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(InputError, match=name):
            chat.answer(tmp_path / name, "What is it?")
    with pytest.raises(InputError, match="1 <image> for 0"):
        chat.reply(Conversation(turns=(user_turn("What?", 1),)), [])


def test_bad_settings_and_too_long_conversations(chat: Chat) -> None:
    with pytest.raises(InputError, match="at least 1 token"):
        chat.answer(None, "Hello?", max_new_tokens=0)
    with pytest.raises(InputError, match="context is 512"):
        chat.answer(None, "word " * 600)
    # Near the end of the context an answer is cut instead of running over it.
    assert chat.answer(None, "7" * 480, max_new_tokens=256) is not None


def test_half_precision_and_adapters(chat: Chat) -> None:
    adapted = get_peft_model(
        make_tiny_model(chat.processor), LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    ).eval()
    plain = chat.answer(make_image("red"), "What?", max_new_tokens=12)
    assert Chat(adapted, chat.processor, "adapter").answer(make_image("red"), "What?", max_new_tokens=12) != plain
    with adapted.disable_adapter():
        assert Chat(adapted, chat.processor, "base").answer(make_image("red"), "What?", max_new_tokens=12) == plain
    half = Chat(make_tiny_model(chat.processor).bfloat16(), chat.processor, "half")
    assert half.answer(make_image("red"), "What?", max_new_tokens=12)


def test_a_model_without_a_chat_template_is_refused(chat: Chat) -> None:
    processor = make_tiny_processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        Chat(chat.model, processor, "bare").answer(None, "Hello?")


def test_an_image_with_transparency_or_rotation_is_made_upright_rgb(chat: Chat, tmp_path: Path) -> None:
    image = make_image("red", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    image.save(tmp_path / "turned.png", exif=exif)
    from_file = chat.prompt(Conversation(turns=(user_turn("?", 1),)), [tmp_path / "turned.png"]).pixel_values
    upright = chat.prompt(Conversation(turns=(user_turn("?", 1),)), [image.rotate(-90, expand=True)]).pixel_values
    assert from_file is not None and upright is not None
    assert from_file.equal(upright)

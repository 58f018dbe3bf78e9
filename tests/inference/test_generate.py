"""Answering encoded prompts on a model in memory, in the middle of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qllava.conversation import Conversation
from qllava.inference import Chat, Room, answer_prompts, user_turn
from qllava.inference.generate import Pieces
from tests.tiny_models import make_image, make_tiny_model, make_tiny_processor


@pytest.fixture(scope="module")
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


def prompts_of(chat: Chat, questions: list[str]) -> tuple[list[list[int]], list[torch.Tensor | None]]:
    image = make_image("red")
    prompts = [chat.prompt(Conversation(turns=(user_turn(question, 1),)), [image]) for question in questions]
    return [prompt.input_ids for prompt in prompts], [prompt.pixel_values for prompt in prompts]


def test_order_and_progress_are_kept(chat: Chat) -> None:
    questions = ["One?", "A much longer question than the one before it?", "A middling question?", "Two?"]
    ids, pixels = prompts_of(chat, questions)
    counts: list[int] = []
    answers = answer_prompts(
        chat.model, chat.processor.tokenizer, ids, pixels, max_new_tokens=6, room=Room(3), done=counts.append
    )
    assert answers == [chat.answer(make_image("red"), question, max_new_tokens=6) for question in questions]
    assert counts == [3, 1]


def test_modes_are_restored_and_training_goes_on(chat: Chat) -> None:
    model = make_tiny_model(chat.processor)
    model.train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    ids, pixels = prompts_of(chat, ["What?"])
    answer_prompts(model, chat.processor.tokenizer, ids, pixels, max_new_tokens=4)
    assert {name: module.training for name, module in model.named_modules()} == before
    labels = torch.tensor(ids)
    model(input_ids=labels, labels=labels, pixel_values=pixels[0]).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_a_batch_ends_at_its_end_tokens(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(chat.processor)
    with torch.no_grad():  # every answer is the end token at once
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
        model.lm_head.bias[chat.processor.tokenizer.eos_token_id] = 1.0
    steps: list[Any] = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(None))
    ids, pixels = prompts_of(chat, ["One?", "Two?"])
    assert answer_prompts(model, chat.processor.tokenizer, ids, pixels, max_new_tokens=100) == ["", ""]
    assert len(steps) == 1


def test_one_entry_of_pixels_per_prompt(chat: Chat) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1"):
        answer_prompts(chat.model, chat.processor.tokenizer, [[1], [2]], [None], max_new_tokens=1)


def test_no_prompts_no_answers(chat: Chat) -> None:
    assert answer_prompts(chat.model, chat.processor.tokenizer, [], [], max_new_tokens=1) == []


def test_half_a_character_waits_for_its_other_half(chat: Chat) -> None:
    tokenizer = chat.processor.tokenizer
    ids = tokenizer.encode("x é\n y", add_special_tokens=False)
    pieces = Pieces(tokenizer)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    said = [pieces.queue.get() for _ in range(pieces.queue.qsize())]
    assert "".join(filter(None, said)) == "x é\n y"
    assert not any("\ufffd" in (piece or "") for piece in said)

"""Batches by what fits into memory, and halves of them after memory has run out, planted at a given size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qllava.config import InputError
from qllava.conversation import Conversation
from qllava.inference import Chat, Prompt, Room, answer_prompts, batches, user_turn
from qllava.inference.batches import MOST, Batches, attempt, available
from qllava.inference.memory import answering
from tests.small_memory import OUT_OF_MEMORY, small_memory
from tests.tiny_models import IMAGE_TOKENS, make_image, make_tiny_model, make_tiny_processor
from tests.tiny_runs import refusal

QUESTIONS = ["What?", "What colour is the circle?", "How many shapes are there?", "Describe the picture.", "Red?"]
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: can't allocate memory: you tried")
WINDOWS = RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried")


@pytest.fixture
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


def ask(chat: Chat, questions: list[str], **rest: Any) -> list[str]:
    prompts = [chat.prompt(Conversation((user_turn(q, 1),)), [make_image("red")]) for q in questions]
    return chat.complete(prompts, max_new_tokens=6, **rest)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, CPU, WINDOWS, MemoryError()], ids=["gpu", "cpu", "windows", "python"])
def test_a_batch_is_halved_and_the_answers_are_the_same(
    chat: Chat, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, room = ask(chat, QUESTIONS), Room()
    counts: list[int] = []
    sizes = small_memory(monkeypatch, 2, error)
    assert ask(chat, QUESTIONS, room=room, done=counts.append) == expected
    assert sizes == [5, 2, 2, 1] and counts == [2, 2, 1]
    # What was learned is kept for the next call.
    sizes.clear()
    assert ask(chat, QUESTIONS, room=room) == expected
    assert sizes == [2, 2, 1] and room.most == 2


def test_another_error_is_not_tried_again(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = small_memory(monkeypatch, 2, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        ask(chat, QUESTIONS)
    assert sizes == [5]


def test_one_question_that_does_not_fit_is_one_sentence(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, 0, OUT_OF_MEMORY)
    with pytest.raises(InputError) as caught:
        ask(chat, QUESTIONS, names=[f"the question at example {i}" for i in range(5)])
    said = refusal(caught.value)
    assert said.startswith("Not enough memory to answer the question at example 1 of ")
    assert "Besides the model it needs about" in said and "load the model in 4 bit" in said


@pytest.mark.parametrize("question", QUESTIONS[:1])
def test_a_streamed_answer_that_does_not_fit_is_one_sentence(
    chat: Chat, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 0, OUT_OF_MEMORY)
    with pytest.raises(InputError) as caught:
        list(chat.stream(make_image("red"), question))
    assert "Not enough memory to answer the question of" in refusal(caught.value)
    with pytest.raises(InputError, match="Not enough memory to answer question 1 of"):
        chat.answer(make_image("red"), question)


def test_where_other_processes_wait_nothing_is_halved(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = small_memory(monkeypatch, 2, OUT_OF_MEMORY)
    with pytest.raises(InputError, match=r"and 4 others at once"):
        ask(chat, QUESTIONS, room=Room(halves=False))
    assert sizes == [5]


def test_nothing_is_alive_when_it_is_tried_again() -> None:
    """A traceback holds the frames that an error came through, and their tensors with them."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def inner(chained: bool) -> None:
        taken = torch.zeros(1000)
        seen.append(weakref.ref(taken))
        try:
            raise OUT_OF_MEMORY
        except torch.OutOfMemoryError as error:
            if chained:
                raise RuntimeError("not enough memory") from error
            raise

    for chained in (False, True):
        assert attempt(lambda: inner(chained)) is None  # noqa: B023
        assert seen[-1]() is None


def test_batches_are_as_large_as_the_memory(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(chat.prompt(Conversation((user_turn(q, 1),)), [make_image("red")]).input_ids) for q in QUESTIONS]
    longest = sorted(lengths, reverse=True)
    held = sum(tensor.nbytes for tensor in (*chat.model.parameters(), *chat.model.buffers()))
    sizes = small_memory(monkeypatch, 5, OUT_OF_MEMORY)
    for count in (1, 3, 5):
        need = answering(chat.model.config, longest[:count], 6, [1] * count, torch.float32).peak
        sizes.clear()
        ask(chat, QUESTIONS, room=Room(limit=held + need))
        assert sizes[0] == count
    # Less than one takes: it is tried all the same, because a count is no measurement.
    sizes.clear()
    ask(chat, QUESTIONS, room=Room(limit=held))
    assert sizes == [1] * 5


def test_what_is_held_beside_the_model_is_counted(chat: Chat) -> None:
    room = Room(limit=1 << 30)
    before = room.free(chat.model)
    weight = next(chat.model.parameters())
    _, state = bnb.functional.quantize_4bit(weight.data.flatten()[:512], quant_type="nf4", compress_statistics=True)
    weight.quant_state = state
    held = [*(getattr(s, name) for s in (state, state.state2) for name in ("absmax", "code")), state.offset]
    assert before - room.free(chat.model) == sum(tensor.nbytes for tensor in held)
    del weight.quant_state
    weight.grad = torch.zeros_like(weight)
    room.beside = lambda: 5000
    assert before - room.free(chat.model) == weight.nbytes + 5000


def test_there_is_an_upper_bound(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = small_memory(monkeypatch, 1000, OUT_OF_MEMORY)
    ask(chat, QUESTIONS * 8)
    assert sizes == [MOST, 8]


def test_several_processes_form_the_same_batches(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def agree(mine: int) -> int:
        asked.append(mine)
        return 1

    sizes = small_memory(monkeypatch, 5, OUT_OF_MEMORY)
    ask(chat, QUESTIONS, room=Room(agree=agree))
    assert sizes == [1] * 5 and len(asked) == 1 and asked[0] > 1


def test_positions_that_a_rope_scaling_adds_are_for_prompts_and_answers() -> None:
    processor = make_tiny_processor()
    model = make_tiny_model(processor, context=32)
    text: Any = model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": 4.0}
    found = Batches(model, [[5] * 40, [6] * 28, [7] * 120], 12, Room())
    spaces = {}
    while found.waiting:
        batch, space = found.next()
        spaces |= dict.fromkeys(batch, space)
        found.answered(batch)
    assert spaces == {0: 12, 1: 12, 2: 8}


def test_an_answer_does_not_depend_on_what_it_shared_a_batch_with() -> None:
    """A prompt that leaves one token of the context does not cut the answers of the others."""
    processor = make_tiny_processor()
    model = make_tiny_model(processor, context=64)
    short, long = [5] * 10, [6] * 63
    tokenizer = processor.tokenizer
    whole = answer_prompts(model, tokenizer, [short], [None], max_new_tokens=12)
    assert answer_prompts(model, tokenizer, [short, long], [None, None], max_new_tokens=12)[0] == whole[0]
    assert len(tokenizer.encode(whole[0], add_special_tokens=False)) > 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}, 3 << 20),
        ({"memory.max": "2000000\n", "memory.current": "1500000\n", "memory.stat": "inactive_file 200000\n"}, 700000),
        ({"memory.max": "1000\n", "memory.current": "2000\n", "memory.stat": ""}, 0),
        ({}, 3 << 20),
    ],
)
def test_what_is_available(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    3072 kB\n", encoding="ascii")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(batches, "_MEMINFO", meminfo)
    monkeypatch.setattr(batches, "_CGROUP", tmp_path)
    assert available() == expected


def test_images_are_counted_by_their_tokens(chat: Chat) -> None:
    prompt: Prompt = chat.prompt(Conversation((user_turn("What?", 2),)), [make_image("red")] * 2)
    assert prompt.input_ids.count(chat.model.config.image_token_index) == 2 * IMAGE_TOKENS
    one, two = (answering(chat.model.config, [len(prompt.input_ids)], 6, [n], torch.float32).tower for n in (1, 2))
    held = sum(tensor.nbytes for tensor in (*chat.model.parameters(), *chat.model.buffers()))
    waiting: Callable[..., Any] = batches.Batches
    assert waiting(chat.model, [prompt.input_ids], 6, Room(limit=held))._images == [2] and two > one

"""Decoding is what was asked and nothing else: a model's own `generation_config` is shown, and used when asked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from qllava.config import InputError
from qllava.conversation import Conversation
from qllava.inference import Chat, Room, about, answer_prompts, user_turn
from qllava.inference.generate import choosers, continue_prompts, decode_answer, generation_settings
from qllava.models.card import write_card
from qllava.models.outline import Recipe
from qllava.models.recommended import Decoding, recommendation, recommended
from tests.tiny_models import make_image, make_tiny_model, make_tiny_processor

ASKED = Conversation(turns=(user_turn("What colour?", 1),))
RECIPE = Recipe(
    language_model=None,
    vision_tower=None,
    projector_type=None,
    vision_feature_layer=-2,
    image_aspect=None,
    template="chatml",
    load_in_4bit=False,
    model="some/llava",
)
HABITS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 7,
    "top_p": 0.4,
    "min_p": 0.2,
    "typical_p": 0.5,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 2,
    "num_beams": 3,
    "length_penalty": 2.0,
    "early_stopping": True,
    "min_length": 60,
    "min_new_tokens": 9,
    "max_length": 33,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 11,
    "suppress_tokens": list(range(50, 400)),
    "begin_suppress_tokens": list(range(20, 300)),
    "bad_words_ids": [[number] for number in range(100, 200)],
    "sequence_bias": {(number,): -9.0 for number in range(200, 399)},
    "exponential_decay_length_penalty": (1, 2.0),
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "stop_strings": ["e"],
    "max_time": 0.001,
    "use_cache": False,
    "output_scores": True,
    "return_dict_in_generate": True,
    "num_return_sequences": 2,
}


@pytest.fixture
def chat() -> Chat:
    processor = make_tiny_processor()
    return Chat(make_tiny_model(processor), processor, "tiny")


def with_habits(chat: Chat, **habits: Any) -> Chat:
    """The model with a `generation_config` of its own, which keeps its end tokens."""
    config = GenerationConfig(
        eos_token_id=chat.model.generation_config.eos_token_id, pad_token_id=chat.model.generation_config.pad_token_id
    )
    for name, value in habits.items():
        setattr(config, name, value)
    chat.model.generation_config = config
    return chat


def by_hand(chat: Chat, count: int) -> str:
    """The answer token by token, each the largest logit of a plain forward pass."""
    prompt = chat.prompt(ASKED, [make_image("red")])
    ids = list(prompt.input_ids)
    for _ in range(count):
        with torch.no_grad():
            logits = chat.model(input_ids=torch.tensor([ids]), pixel_values=prompt.pixel_values).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == chat.processor.tokenizer.eos_token_id:
            break
    return decode_answer(chat.processor.tokenizer, ids[len(prompt.input_ids) :])


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_is_the_largest_logit_whatever_a_model_recommends(chat: Chat, adapted: bool) -> None:
    chat = with_habits(chat, **HABITS)
    if adapted:
        lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        chat = Chat(get_peft_model(chat.model, lora).eval(), chat.processor, "adapted")
    before = chat.model.generation_config.to_dict()
    expected = by_hand(chat, 14)
    assert len(expected) > 10
    image = make_image("red")
    assert chat.answer(image, "What colour?", max_new_tokens=14) == expected
    assert chat.answer_batch([(image, "What colour?"), (None, "Why?")], max_new_tokens=14)[0] == expected
    assert "".join(chat.stream(image, "What colour?", max_new_tokens=14)) == expected
    prompt = chat.prompt(ASKED, [image])
    said = answer_prompts(
        chat.model, chat.processor.tokenizer, [prompt.input_ids], [prompt.pixel_values], max_new_tokens=14
    )
    assert said == [expected]
    assert chat.model.generation_config.to_dict() == before, "the model keeps what it recommends"


def test_every_field_of_a_generation_config_is_without_effect(chat: Chat) -> None:
    """Nothing reaches `generate` but what was asked: a field that a later transformers adds changes nothing."""
    plain = chat.answer(None, "Say", max_new_tokens=8)
    seen: list[GenerationConfig] = []
    inner = type(chat.model)._prepare_generation_config

    def spy(model: Any, *given: Any, **rest: Any) -> Any:
        found = inner(model, *given, **rest)
        seen.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(chat.model), "_prepare_generation_config", spy)
        chat.answer(None, "Say", max_new_tokens=8)
        with_habits(chat, **HABITS, an_entry_of_its_own=1)
        assert chat.answer(None, "Say", max_new_tokens=8) == plain
    assert seen[0].to_dict() == seen[1].to_dict()


def test_seeded_and_unseeded_draws_are_of_the_softmax(chat: Chat) -> None:
    chat = with_habits(chat, do_sample=True, top_k=1, top_p=0.1, min_p=0.9, temperature=0.1)
    prompt = chat.prompt(Conversation(turns=(user_turn("Say", 0),)), [])
    with torch.no_grad():
        logits = chat.model(input_ids=torch.tensor([prompt.input_ids])).logits[0, -1].float()
    expected = torch.softmax(logits / 1.5, -1)
    settings = generation_settings(chat.model, chat.processor.tokenizer, [prompt.input_ids], 1, 1.5)
    shares = []
    for seed in (None, 3):
        choose = choosers(Decoding(temperature=1.5), seed)
        drawn = [
            continue_prompts(chat.model, [prompt.input_ids] * 1000, [None] * 1000, settings, choose=choose)
            for _ in range(3)
        ]
        shares.append(torch.bincount(torch.cat(drawn)[:, 0], minlength=len(expected)) / 3000)
        assert torch.allclose(shares[-1], expected, atol=0.03)
    by_text: defaultdict[str, float] = defaultdict(float)
    for id, share in enumerate(expected.tolist()):
        by_text[decode_answer(chat.processor.tokenizer, [id])] += share
    said = Counter(chat.complete([prompt] * 2000, max_new_tokens=1, temperature=1.5, room=Room(1000)))
    assert max(abs(said[text] / 2000 - share) for text, share in by_text.items()) < 0.04


def test_what_a_model_recommends_is_taken_when_asked_for(chat: Chat) -> None:
    chat = with_habits(chat, repetition_penalty=1.7, no_repeat_ngram_size=2)
    prompt = chat.prompt(ASKED, [make_image("red")])
    ids = torch.tensor([prompt.input_ids])
    out = chat.model.generate(input_ids=ids, pixel_values=prompt.pixel_values, max_new_tokens=20, do_sample=False)
    expected = decode_answer(chat.processor.tokenizer, out[0, ids.shape[1] :].tolist())
    asked = replace(chat, recommended_sampling=True)
    with_it = asked.reply(ASKED, [make_image("red")], max_new_tokens=20)
    without = chat.reply(ASKED, [make_image("red")], max_new_tokens=20)
    assert "".join(with_it) == expected != "".join(without)
    # Its temperature holds unless another is given; its limits hold for both.
    chat = with_habits(chat, do_sample=True, temperature=2.0, top_k=1)
    greedy = chat.answer(make_image("red"), "What colour?", max_new_tokens=12)
    assert chat.recommended == Decoding(temperature=2.0, top_k=1)
    for temperature in (None, 5.0):
        said = asked.reply(ASKED, [make_image("red")], max_new_tokens=12, temperature=temperature, seed=1)
        assert "".join(said) == greedy


def test_what_cannot_be_done_is_said(chat: Chat) -> None:
    chat = with_habits(chat, do_sample=True, top_p=-5.0)
    with pytest.raises(InputError, match=r"sampling values are invalid .*--sampling"):
        replace(chat, recommended_sampling=True).reply(ASKED, [make_image("red")])


@pytest.mark.parametrize(
    ("habits", "said"),
    [
        ({}, ""),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ""),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "temperature 0.6, top_p 0.9"),
        ({"do_sample": True}, "temperature 1"),
        ({"repetition_penalty": 1.05}, "repetition_penalty 1.05"),
        ({"num_beams": 4, "repetition_penalty": 1.2}, "repetition_penalty 1.2; num_beams (never used)"),
        ({"temperature": "hot", "do_sample": True, "top_k": None}, "temperature 1"),
    ],
)
def test_what_a_model_recommends_is_shown(chat: Chat, habits: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert recommendation(habits) == recommendation(with_habits(chat, **habits).model.generation_config) == said
    assert recommended(GenerationConfig()) == Decoding()
    assert about(chat).get("Recommended sampling", "") == said
    (tmp_path / "generation_config.json").write_text(chat.model.generation_config.to_json_string(use_diff=True))
    write_card(tmp_path, tmp_path, RECIPE, "transformers", ["A model."])
    card = (tmp_path / "README.md").read_text()
    assert (f"Recommended sampling of the base model: {said}." in card) is bool(said)

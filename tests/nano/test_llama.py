"""nano's LLaMA: its tokenizer, the texts it learns from with what is learned in them, and its training."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qllava.config import NANO_WEIGHTS
from qllava.nano import language, llama, texts, unknown
from qllava.nano.scenes import Scene, sample_scene

IGNORED = -100


ABOUT_SCENES = replace(llama.ROUNDS[-1], captions=0.15, maps=0.55, copies=0.0, strange=0.0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return texts.train_tokenizer()


def a_text(seed: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Scene, list[int], list[int]]:
    """A text with the scene that it is about, drawn again from the same seed."""
    rng = random.Random(seed)
    scene = sample_scene(rng, unseen=rng.random() < 0.1)
    return scene, *texts.text(random.Random(seed), tokenizer.backend_tokenizer, ABOUT_SCENES)


def learned(labels: list[int]) -> list[list[int]]:
    """The unbroken runs of labels."""
    out: list[list[int]] = []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                out.append([])
            out[-1].append(label)
    return out


def test_every_word_of_a_map_is_one_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    words = language.map_words()
    ids = tokenizer([" " + word for word in words])["input_ids"]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(words)


def test_every_byte_is_covered_and_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "\x00 Größe 漢字 🟥\tx\r\n  12345 " + "".join(map(chr, range(32, 256)))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_marks_are_where_the_model_expects_them(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids([texts.END_OF_TEXT, texts.START, texts.END]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 0)
    assert len(tokenizer) <= texts.VOCABULARY


def test_the_shipped_tokenizer_is_the_one_that_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    shipped = json.loads((NANO_WEIGHTS / "llama" / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped["model"] == json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_answers_and_their_end_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(200):
        scene, ids, labels = a_text(seed, tokenizer)
        assert len(ids) == len(labels)
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        text, said = tokenizer.decode(ids), [tokenizer.decode(run) for run in learned(labels)]
        if text.startswith(texts.END_OF_TEXT):
            assert said == [language.full_caption(scene) + "\n"]
            assert text.endswith(said[0])
        else:
            assert text.startswith("<|im_start|>user\n")
            assert said == re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
            assert len(said) >= 6


def test_a_map_stands_where_an_image_will(tokenizer: PreTrainedTokenizerFast) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(400):
        scene, ids, labels = a_text(seed, tokenizer)
        words = language.scene_map(scene)
        shown = [tokenizer(" " + word)["input_ids"][0] for word in words]
        before = tokenizer(texts.END_OF_TEXT)["input_ids"]
        kind = "caption"
        if ids[0] != before[0]:
            before = tokenizer("<|im_start|>user\n")["input_ids"]
            kind = "questions"
        assert ids[: len(before)] == before
        if ids[len(before) : len(before) + 36] == shown:
            assert set(labels[: len(before) + 36]) == {IGNORED}
            after = tokenizer.decode(ids[len(before) + 36 :])
            assert "<image>" not in after and not set(words) - {"."} & set(after.split())
            assert after.startswith(language.full_caption(scene) if kind == "caption" else "\n")
            kinds[f"map, {kind}"] += 1
        else:
            facts = tokenizer.decode(ids).split("\n")[1]
            assert re.match(r"There is an? |[a-z ]+: (small|medium|large) ", facts)
            kinds["sentences"] += 1
    assert 35 < kinds["map, caption"] < 85
    assert 180 < kinds["map, questions"] < 260
    assert 80 < kinds["sentences"] < 160


def test_what_is_no_map_is_answered_by_what_nano_knows(tokenizer: PreTrainedTokenizerFast) -> None:
    strange = replace(ABOUT_SCENES, strange=1.0, captions=0.0)
    words = {f" {word}" for word in language.map_words() if word != language.MAP_BLANK}
    for seed in range(50):
        ids, labels = texts.text(random.Random(seed), tokenizer.backend_tokenizer, strange)
        said = [tokenizer.decode(run) for run in learned(labels)]
        assert said == [unknown.SENTENCE + "<|im_end|>"] * 4
        assert not words & {tokenizer.decode([one]) for one in ids}


def test_facts_as_sentences_are_complete_in_any_order() -> None:
    orders = set()
    for seed in range(100):
        rng = random.Random(seed)
        scene = sample_scene(random.Random(f"scene-{seed}"))
        facts = texts.sentences(scene, rng)
        for s in scene.shapes:
            assert f"{s.size} {s.colour} {s.form} {language.AT[s.place]}" in facts or (
                f"{s.place}: {s.size} {s.colour} {s.form}" in facts.splitlines()
            )
        first, second = (facts.index(f"{s.size} {s.colour} {s.form}") for s in scene.shapes[:2])
        orders.add(first < second)
    assert orders == {True, False}


def test_rows_are_cut_and_padded_to_one_length() -> None:
    long, short = list(range(1, 401)), [5, 6]
    ids, labels = llama._rows([(long, long), (short, [IGNORED, 6])])
    assert ids.shape == labels.shape == (2, llama.LENGTH)
    assert ids[0].tolist() == labels[0].tolist() == long[: llama.LENGTH]
    assert ids[1].tolist() == [5, 6] + [0] * (llama.LENGTH - 2)
    assert labels[1].tolist() == [IGNORED, 6] + [IGNORED] * (llama.LENGTH - 2)


def test_the_model_is_what_the_later_steps_count_on() -> None:
    config = llama.build(1538).config
    for width in (config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads):
        assert width % 64 == 0, "NF4 and GGUF store weights in blocks"
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 2048


def test_two_steps_train_every_weight_and_are_repeated_by_the_seed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    torch.manual_seed(0)
    untrained = dict(llama.build(len(tokenizer)).named_parameters())
    rounds = (replace(llama.ROUNDS[-1], steps=2, batch=2),)
    one, two = (llama.train(tokenizer, rounds) for _ in range(2))
    assert not one.training
    again = dict(two.named_parameters())
    for name, weight in one.named_parameters():
        assert torch.isfinite(weight).all()
        assert not torch.equal(weight, untrained[name]), name
        assert torch.equal(weight, again[name]), name


def test_words_that_mean_nothing_are_answered_as_they_were_given(tokenizer: PreTrainedTokenizerFast) -> None:
    only_copies = replace(llama.ROUNDS[-1], copies=1.0)
    seen: set[str] = set()
    for seed in range(300):
        ids, labels = texts.text(random.Random(seed), tokenizer.backend_tokenizer, only_copies)
        text = tokenizer.decode(ids)
        facts = dict(re.findall(r"^([a-z ]+): (.+)$", text, re.MULTILINE))
        places = {f"What is {language.AT[place]}?": words for place, words in facts.items()}
        asked = re.findall(r"(What is [a-z ]+\?)<\|im_end\|>", text)
        assert sorted(asked) == sorted(places)
        assert [tokenizer.decode(run) for run in learned(labels)] == [places[q] + "<|im_end|>" for q in asked]
        seen.update("".join(facts.values()))
    assert {*"azAZ09-ü"} <= seen


def test_a_word_of_a_map_becomes_the_sum_of_its_parts(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    rounds = tuple(replace(round_, steps=2, batch=2) for round_ in llama.ROUNDS)
    table = llama.train(tokenizer, rounds).get_input_embeddings().weight

    def row(word: str) -> torch.Tensor:
        (index,) = tokenizer(f" {word}")["input_ids"]
        return table[index]

    # A difference in one attribute is the same vector, whatever the others are.
    one = row("largeredcircletop") - row("largebluecircletop")
    other = row("smallredringbottomleft") - row("smallblueringbottomleft")
    assert torch.allclose(one, other, atol=1e-5)
    assert one.norm() > 1e-3


def test_making_words_of_parts_changes_no_word_that_is_their_sum_already(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    table = llama.build(len(tokenizer)).get_input_embeddings()
    first = llama.Words(table, tokenizer, ("size", "colour", "form", "place"))
    first.fold()
    again = llama.Words(table, tokenizer, llama.ROUNDS[-1].shared)
    assert again.vectors.shape == (3 + 6 + 6 + 9 + 3 + 3, 192)
    torch.testing.assert_close(again.weight(), first.weight(), rtol=0, atol=1e-5)


def test_a_shortened_model_keeps_every_second_layer_and_answers_alike_with_and_without_a_cache() -> None:
    model = llama.build(300).eval()
    kept = [layer.self_attn.q_proj.weight.clone() for layer in list(model.model.layers)[::2]]
    llama.shorten(model)
    assert model.config.num_hidden_layers == len(model.model.layers) == len(kept) == 3
    assert all(torch.equal(a, b.self_attn.q_proj.weight) for a, b in zip(kept, model.model.layers, strict=True))
    given = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        said = [model.generate(given, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*said)

"""What is trained on equals what plain transformers writes with the saved model: ids, and which of them are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase

from qllava.conversation import IMAGE_TOKEN, PLAIN, TEMPLATES, Conversation, Template, Turn, ask
from qllava.data.encode import IGNORE_INDEX, Encoder
from qllava.data.formats import Example
from qllava.data.problems import Place
from qllava.models.checkpoint import build_processor
from qllava.models.vision import load_tower
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_model, make_tiny_tokenizer, save_llava
from tests.tiny_runs import Tiny

WORDS = st.lists(
    st.sampled_from(["red", " ", "  ", "\n", ".", ":", "<", "é", "😀", "7", "{{ x }}", "USER:", "\\n"])
    | st.characters(exclude_categories=("Cs",)),
    min_size=1,
    max_size=10,
).map("".join)  # fmt: skip
SAID = WORDS.filter(str.strip)


def saved(template: Template, tokenizer: PreTrainedTokenizerBase, tiny: Tiny, folder: Path) -> Any:
    """The processor of a model as it was saved, loaded by plain transformers."""
    processor = build_processor(tokenizer, load_tower(str(tiny.tower)), template.chat_template())
    save_llava(make_tiny_model(processor), processor, folder)
    return AutoProcessor.from_pretrained(folder)


# Llama's own kind of tokenizer goes with its template: one that is trained here, and Llama's where it is there.
KINDS = {name: "" for name in TEMPLATES if name != "llama_2"} | {
    "llama_2": "trained_tokenizer",
    "llama_2 with Llama's tokenizer": "llama_tokenizer",
}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Any]:
    """The encoder of a template, and the processor that was saved with a model of that template."""
    template = TEMPLATES[request.param.split()[0]]
    if KINDS[request.param]:
        tokenizer = request.getfixturevalue(KINDS[request.param])
    else:
        tokenizer = make_tiny_tokenizer()
        tokenizer.add_tokens(list(template.controls), special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processor = saved(template, tokenizer, tiny, tmp_path_factory.mktemp(template.name) / "model")
    return Encoder(tokenizer, template, image, IMAGE_LAYOUT), processor


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3),
    images=st.integers(0, 2),
    system=st.none() | SAID,
)
def test_ids_and_learned_tokens_are_those_of_apply_chat_template(
    both: tuple[Encoder, Any], rounds: list[tuple[str, str]], images: int, system: str | None
) -> None:
    encoder, processor = both
    template = encoder.template
    if template is PLAIN:
        rounds, images, system = rounds[:1], 1, None
    said = [words for pair in rounds for words in pair]
    # As `formats` brings it about: images first, each with a newline, and no white space around the question.
    said[0] = ask(said[0].strip(), images)
    turns = tuple(Turn("assistant" if n % 2 else "user", content) for n, content in enumerate(said))
    example = Example("x", (Path("a.png"),) * images, Conversation(turns, system), Place("rows.json", row=1))
    sample = encoder.encode(example)
    assert sample is not None

    image = Image.new("RGB", (20, 20))
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": _text(system)}]
    for n, content in enumerate(said):
        words = content.replace(IMAGE_TOKEN, "").lstrip("\n") if n == 0 else content
        shown = [{"type": "image", "image": image}] * (images if n == 0 else 0)
        parts = shown + _text(words) if words or not shown else shown
        messages.append({"role": "assistant" if n % 2 else "user", "content": parts if n == 0 else content})
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    assert out["input_ids"][0].tolist() == sample.input_ids
    learned = [int(label != IGNORE_INDEX) for label in sample.labels]
    assert out["assistant_masks"][0].tolist() == learned


def _text(words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words}]

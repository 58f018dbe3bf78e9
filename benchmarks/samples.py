"""Synthetic training samples: images of noise, and questions and answers as long as those of LLaVA-Instruct.

The length of a sample's text has a log-normal distribution with a mean of 200 tokens; about half of it is learned. The
words have no meaning. They come from a vocabulary of a few hundred, so that there is something to learn (their
frequencies) and losses can be compared.

All systems get the same examples, and the same samples in each optimizer step. Steps are those of `packing.steps_of`,
as in a run of qllava: samples about one image are together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from qllava.conversation import CHATML, IMAGE_TOKEN, ask
from qllava.data.packing import steps_of
from qllava.image_layout import ImageLayout

MEAN_TOKENS = 200
SPREAD = 0.55
"""Standard deviation of the logarithm of a text's length."""
TEMPLATE_TOKENS = 6
"""Tokens that ChatML adds to a question and its answer: starts and ends of turns, and the two roles."""
WORDS = 256
MIXTURE = {1: 0.30, 2: 0.45, 3: 0.25}
"""Shares of images with one, two and three samples; their mean is 1.95, that of LLaVA-Instruct-158K."""


@dataclass(frozen=True)
class Text:
    """The texts and the image of an example."""

    image: str
    """Path of the image file."""
    question: str
    """Words of the question, separated by spaces."""
    answer: str
    """Words of the answer, separated by spaces."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the text; the tokenizer has one for each word."""
        return len(self.question.split()) + len(self.answer.split()) + TEMPLATE_TOKENS


def make_processor(config: LlavaConfig) -> LlavaProcessor:
    """Return a processor whose tokenizer has one token per word, with ids below that of `<image>`, and uses ChatML."""
    image_token: int = config.image_token_index
    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "user", "assistant"]
    words += [f"w{number}" for number in range(image_token - len(words))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, IMAGE_TOKEN])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", IMAGE_TOKEN],
    )
    side, image = config.vision_config.image_size, ImageLayout.of_config(config)
    return LlavaProcessor(
        image_processor=LlavaImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=image.strategy,
        num_additional_image_tokens=image.additional,
        chat_template=CHATML.chat_template(),
    )


def make_texts(
    folder: Path, *, side: int, samples_per_image: float, samples_per_step: int, steps: int, seed: int
) -> list[Text]:
    """Return the samples of `steps` optimizer steps in order, and write their images.

    Args:
        folder: Folder for the images.
        side: Width and height of an image in pixels.
        samples_per_image: A whole number, or 1.95 for a mixture.
        samples_per_step: Samples of an optimizer step.
        steps: Number of optimizer steps.
        seed: Seed of all random choices.

    Raises:
        ValueError: If `samples_per_image` is another fraction.
    """
    rng = np.random.default_rng([seed, round(100 * samples_per_image)])
    shown: list[int] = []
    while len(shown) < steps * samples_per_step + 64:
        shown += [len(shown) + 1] * _group(rng, samples_per_image)
    order = steps_of(np.array(shown), samples_per_step, seed=seed, epoch=0)
    chosen = np.concatenate([next(order) for _ in range(steps)])
    folder.mkdir(parents=True, exist_ok=True)
    return [_text(rng, _image(folder, side, samples_per_image, shown[index])) for index in chosen]


def _group(rng: np.random.Generator, samples_per_image: float) -> int:
    """Return how many samples the next image has."""
    if samples_per_image == round(samples_per_image):
        return round(samples_per_image)
    mean = sum(size * share for size, share in MIXTURE.items())
    if abs(mean - samples_per_image) > 1e-6:
        raise ValueError(f"samples per image must be a whole number or {mean:.2f}, not {samples_per_image}")
    return int(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))


def _text(rng: np.random.Generator, image: str) -> Text:
    drawn = rng.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD)
    length = int(np.clip(drawn, 24, 700)) - TEMPLATE_TOKENS
    learned = max(1, round(length * rng.uniform(0.4, 0.6)))
    # Some words are frequent and others rare, as in a natural language.
    numbers = (WORDS * rng.random(length) ** 2).astype(int)
    words = [f"w{number}" for number in numbers]
    return Text(image, " ".join(words[learned:]), " ".join(words[:learned]))


def _image(folder: Path, side: int, samples_per_image: float, number: int) -> str:
    path = folder / f"{samples_per_image}-{number:05d}.jpg"
    if not path.exists():
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(path, quality=85)
    return str(path)


def write_texts(path: Path, texts: Sequence[Text]) -> None:
    """Write samples to a file, for the processes that train on them."""
    path.write_text(json.dumps([asdict(text) for text in texts]), encoding="utf-8")


def read_texts(path: Path) -> list[Text]:
    """Read the samples that `write_texts` wrote."""
    return [Text(**record) for record in json.loads(path.read_text(encoding="utf-8"))]


def as_messages(text: Text) -> dict[str, Any]:
    """Return an example in TRL's format."""
    turns = [{"role": "user", "content": text.question}, {"role": "assistant", "content": text.answer}]
    return {"messages": turns, "images": [text.image]}


def as_conversation(number: int, text: Text) -> dict[str, Any]:
    """Return an example in LLaVA's format; its image path is relative to the image folder."""
    turns = [{"from": "human", "value": ask(text.question)}, {"from": "gpt", "value": text.answer}]
    return {"id": f"{number:06d}", "image": Path(text.image).name, "conversations": turns}


def within_steps(texts: Sequence[Text], samples_per_step: int, order: str, seed: int) -> list[Text]:
    """Return the samples in another order within each step.

    Args:
        texts: Samples of all steps in order.
        samples_per_step: Samples of an optimizer step.
        order: `shuffled`, as in plain data, or `sorted`, the longest first.
        seed: Seed of the shuffling.
    """
    rng = np.random.default_rng(seed)
    out: list[Text] = []
    for start in range(0, len(texts), samples_per_step):
        step = list(texts[start : start + samples_per_step])
        if order == "sorted":
            step.sort(key=lambda text: -text.tokens)
        else:
            rng.shuffle(step)  # type: ignore[arg-type]
        out += step
    return out

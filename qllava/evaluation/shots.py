"""In-context learning: examples from a pool precede a question, with their images and answers.

    qllava eval vqa MODEL questions.json --shots 2 --pool train.json --choose picture

The examples are drawn at `random` (by a seed and the question's index), or they are those most similar to the question,
with the most similar one last:

    text      cosine of TF-IDF vectors of the last questions: words in lower case, weight (1 + log tf) * idf with
              idf = log(N / df) + 1 over the N examples of the pool
    picture   cosine of the tower's features, as the projector gets them, averaged over the patches and the images

An example of the pool that shows an image of the question (or, for a question without an image, asks the same) is never
used, so that a pool can overlap with the questions without revealing an answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation
from qllava.data.formats import Example
from qllava.data.images import open_image
from qllava.image_layout import ImageLayout
from qllava.inference import Chat, attempt

Choose = Literal["random", "text", "picture"]
_IMAGES = 32  # maximum number of images in a batch of the tower


@dataclass(frozen=True)
class Shots:
    """Number of examples before each question, and how they are chosen."""

    count: int
    """Number of examples."""
    pool: Sequence[Example]
    """Examples to choose from; each ends with an answer."""
    choose: Choose = "random"
    """Method of the choice."""
    seed: int = 0
    """Seed of a random choice."""


def with_shots(examples: Sequence[Example], shots: Shots, chat: Chat | None = None) -> list[Example]:
    """Return the examples with their shots before them, as longer conversations; ids, places and types do not change.

    Args:
        examples: Questions with their answers.
        shots: Pool, and the number and choice of the shots.
        chat: Model whose tower computes features of images; needed only for a choice by image.

    Raises:
        InputError: The pool is too small for a question, or an example has no image for a choice by image.
    """
    pool = shots.pool
    near = _nearness(examples, shots, chat)
    images = [set(one.images) for one in pool]
    asked = [last_question(one) for one in pool]
    out = []
    for index, example in enumerate(examples):
        mine, question = set(example.images), last_question(example)
        ranked = (int(number) for number in near(index))
        allowed = (n for n in ranked if (not mine & images[n] if mine else question != asked[n]))
        chosen = [number for number, _ in zip(allowed, range(shots.count), strict=False)]
        if len(chosen) < shots.count:
            problem = f"the pool has {len(chosen)} examples for this question that do not show its image"
            raise InputError(f"{example.where}: {problem}, expected {shots.count}; give a larger --pool.")
        out.append(_joined([pool[number] for number in reversed(chosen)], example))
    return out


def last_question(example: Example) -> str:
    """Return the text of the last question."""
    return example.conversation.turns[-2].content.replace(IMAGE_TOKEN, " ").strip()


def _nearness(examples: Sequence[Example], shots: Shots, chat: Chat | None) -> Callable[[int], Iterable[int]]:
    """Return a function from the index of a question to the indices of the pool, the best example first."""
    if shots.choose == "random":
        return lambda index: _drawn(random.Random(f"{shots.seed}-{index}"), len(shots.pool))
    if shots.choose == "text":
        words = Words([last_question(one) for one in shots.pool])
        return lambda index: _best_first(words.similarity(last_question(examples[index])))
    if chat is None:
        raise ValueError("to choose by image a model is needed, whose tower looks at them")
    without = next((one for one in (*shots.pool, *examples) if not one.images), None)
    if without is not None:
        raise InputError(f"{without.where}: the example has no image to choose by; use --choose text or random.")
    paths = list(dict.fromkeys(path for one in (*shots.pool, *examples) for path in one.images))
    seen = dict(zip(paths, embed_images(chat, paths), strict=True))
    pool = np.stack([_mean([seen[path] for path in one.images]) for one in shots.pool])
    return lambda index: _best_first(pool @ _mean([seen[path] for path in examples[index].images]))


def _drawn(rng: random.Random, n: int) -> Iterator[int]:
    """Yield 0 to n - 1 in random order, lazily, because few of hundreds of thousands are needed."""
    moved: dict[int, int] = {}
    for left in range(n, 0, -1):
        place = rng.randrange(left)
        yield moved.get(place, place)
        moved[place] = moved.get(left - 1, left - 1)


@dataclass(frozen=True)
class Words:
    """TF-IDF vectors of the texts of a pool."""

    texts: Sequence[str]
    """Texts of the pool, N in all."""

    def similarity(self, text: str) -> NDArray[np.float64]:
        """Return the cosine of a text with each text of the pool, shape (N,); words unknown to the pool are ignored."""
        found: NDArray[np.float64] = (self._matrix @ self._vector(text).T).toarray()[:, 0]
        return found

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(dict.fromkeys(w for text in self.texts for w in _words(text)))}

    @cached_property
    def _idf(self) -> NDArray[np.float64]:
        df = Counter(word for text in self.texts for word in set(_words(text)))
        return np.log(len(self.texts) / np.array([df[word] for word in self._columns] or [1])) + 1

    @cached_property
    def _matrix(self) -> Any:
        return sparse.vstack([self._vector(text) for text in self.texts], format="csr")

    def _vector(self, text: str) -> Any:
        counts = {word: n for word, n in Counter(_words(text)).items() if word in self._columns}
        columns = [self._columns[word] for word in counts]
        values = (1 + np.log(np.array(list(counts.values()), dtype=np.float64))) * self._idf[columns]
        length = np.linalg.norm(values)
        shape = (1, max(1, len(self._columns)))
        return sparse.csr_matrix((values / (length or 1.0), ([0] * len(columns), columns)), shape=shape)


def embed_images(chat: Chat, paths: Sequence[Path]) -> NDArray[np.float32]:
    """Return the features that the projector gets, averaged over the patches and of length 1, shape (N, D).

    Raises:
        InputError: An image cannot be opened, or there is not enough memory for a single image.
    """
    model = chat.model.base_model.model if hasattr(chat.model, "peft_config") else chat.model
    out, done, size = [], 0, _IMAGES
    with torch.no_grad(), tqdm(total=len(paths), desc="images", disable=None) as bar:
        while done < len(paths):
            some = paths[done : done + size]
            found = attempt(partial(_embed, model, chat.processor.image_processor, some))
            if found is None:
                if len(some) == 1:
                    raise InputError(
                        f"There is not enough memory to compute features of the image {some[0]}; close other programs."
                    )
                size = len(some) // 2
                continue
            out.append(found)
            done += len(some)
            bar.update(len(some))
    return np.concatenate(out)


def _embed(model: Any, image_processor: Any, paths: Sequence[Path]) -> NDArray[np.float32]:
    """Return the features of one batch, as `embed_images` does."""
    tower, config = model.model.vision_tower, model.config
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    start = ImageLayout.of_config(config).first
    pixels = image_processor(images=[open_image(path) for path in paths], return_tensors="pt")["pixel_values"]
    states = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, start:]
    found: NDArray[np.float32] = torch.nn.functional.normalize(features.float().mean(1), dim=-1).cpu().numpy()
    return found


def _mean(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the mean direction of several vectors of length 1."""
    total = np.sum(vectors, axis=0)
    unit: NDArray[np.float32] = total / (np.linalg.norm(total) or 1.0)
    return unit


def _best_first(similarity: NDArray[Any]) -> NDArray[np.intp]:
    """Return indices by falling similarity, rounded so that all machines agree; ties are in the order of the pool."""
    return np.argsort(-np.round(similarity, 6), kind="stable")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _joined(before: Sequence[Example], example: Example) -> Example:
    turns = tuple(turn for one in before for turn in one.conversation.turns)
    images = tuple(image for one in before for image in one.images)
    conversation = Conversation((*turns, *example.conversation.turns), example.conversation.system)
    return replace(example, images=(*images, *example.images), conversation=conversation)

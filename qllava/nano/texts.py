"""The texts that nano's LLaMA learns from, and its tokenizer: written scenes, and questions about them.

- Scenes as sentences, in any order, and questions about them: language and the forms of questions and answers.
- Scenes as maps (`language.scene_map`): 6 x 6 words in reading order, one word for each patch, as the tower will give
  one token for each patch. A word such as "largeredcircletopleft" is a single token and holds all that an image's
  token will hold. A LLaMA that has only read sentences looks a shape up over eight tokens and has no circuit for one
  token that says it all.
- Maps of words that are none of a map, and questions that are not about shapes: both are answered by what nano knows.
- Words that mean nothing, to be repeated.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qllava.conversation import CHATML, IMAGE_TOKEN, Conversation, Rendered, Turn
from qllava.nano import language, talk, unknown
from qllava.nano.scenes import PLACES, Scene, sample_scene

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 3072
# Llama 3's pre-tokenizer, which llama.cpp knows by name.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts of nano; covers every byte, and every word of a map is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [" " + " ".join(language.map_words())] * 20
    for _ in range(3000):
        scene = sample_scene(rng, unseen=rng.random() < 0.2)
        said = CHATML.render(conversation(scene, rng, facts=sentences(scene, rng))).text
        texts.append(" " + said.replace(START, "\n").replace(END, "\n"))
        texts.append(language.full_caption(scene))
    tokenizer.train_from_iterator(texts, trainer)
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    split = [w for w in language.map_words() if len(out(" " + w)["input_ids"]) != 1]
    if split:
        raise ValueError(f"{len(split)} words of the map are no single token, {split[0]} for one: raise VOCABULARY")
    return out


def sentences(scene: Scene, rng: random.Random) -> str:
    """The facts of a scene as prose or as a terse list, in any order."""
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    said = [f"{language.article(f'{s.size} {s.colour} {s.form}')} {language.AT[s.place]}" for s in shapes]
    if rng.random() < 0.5:
        return "There is " + ", ".join(said) + "."
    return "\n".join(f"{s.place}: {s.size} {s.colour} {s.form}" for s in shapes)


def conversation(
    scene: Scene, rng: random.Random, *, facts: str, count: int = 10, types: tuple[str, ...] = language.TYPES
) -> Conversation:
    """Facts, and `count` questions about them with their answers; now and then a description or reasons instead."""
    pairs = talk.turns(scene, rng, count, types)
    if rng.random() < 0.15:
        pairs = [talk.detail(scene, rng), *pairs[: count // 2]]
    elif rng.random() < 0.2:
        pairs = [talk.reasoning(scene, rng), *pairs[: count // 2]]
    return _told(facts, pairs)


def _told(facts: str, pairs: list[tuple[str, str]]) -> Conversation:
    """The conversation of questions and answers, the first after the facts."""
    asked = [f"{facts}\n{pairs[0][0]}", *(question for question, _ in pairs[1:])]
    said = zip(asked, (answer for _, answer in pairs), strict=True)
    return Conversation(tuple(t for q, a in said for t in (Turn("user", q), Turn("assistant", a))))


def copying(rng: random.Random) -> Conversation:
    """What stands at each of a few places, in words that mean nothing, and questions that are answered by them.

    The head is the table of embeddings: without these it would never have said most of its tokens, and tuning, which
    leaves it as it is, could not bring it to say them.
    """
    there = {place: _meaningless(rng) for place in rng.sample(PLACES, rng.randint(1, 4))}
    pairs = [(f"What is {language.AT[place]}?", words) for place, words in there.items()]
    rng.shuffle(pairs)
    facts = "\n".join(f"{place}: {words}" for place, words in there.items())
    return _told(facts, pairs)


def _meaningless(rng: random.Random) -> str:
    """One to four words of random letters; some begin with a capital, some are signs of any kind."""
    out = []
    for _ in range(rng.randint(1, 4)):
        alphabet = (
            string.ascii_lowercase if rng.random() < 0.85 else string.ascii_letters + string.digits + "-.,'äéñöüß"
        )
        word = "".join(rng.choices(alphabet, k=rng.randint(1, 7)))
        out.append(word.capitalize() if rng.random() < 0.15 else word)
    return " ".join(out)


@dataclass(frozen=True)
class Round:
    """One cycle of the learning rate over texts of its own."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Texts a step."""
    lr: float
    """The highest learning rate of the embeddings; it falls to nothing along a cosine."""
    muon_lr: float
    """That of the matrices."""
    captions: float
    """Share of texts that are a map and its caption, as stage 1 will ask."""
    maps: float
    """Share of texts that are a map and a conversation; the rest are sentences and a conversation."""
    types: tuple[str, ...]
    """Types of questions are drawn from these; one that stands here twice is drawn twice as often."""
    shared: tuple[str, ...]
    """The embedding of a map's word is the sum of vectors for these attributes of its shape (`Words`); () for none."""
    copies: float = 0.0
    """Share of texts whose facts and answers are words that mean nothing (`copying`)."""
    strange: float = 0.0
    """Share of the texts after `copies` and `captions` whose map is of words that are none of a map."""


def text(rng: random.Random, tokenizer: Tokenizer, round_: Round) -> tuple[list[int], list[int]]:
    """One text to learn from: ids and, where something is answered, the same ids as labels; -100 elsewhere.

    A map takes the place that the tokens of an image will take: where `<image>` stands.
    """
    if round_.copies and rng.random() < round_.copies:
        return _with_labels(CHATML.render(copying(rng)), tokenizer)
    scene = sample_scene(rng, unseen=rng.random() < 0.1)
    kind = rng.random()
    words = tokenizer.encode(" " + " ".join(language.scene_map(scene))).ids
    if kind < round_.captions:
        # As stage 1 will ask: after the image comes the caption that names everything, and a line's end.
        given = tokenizer.encode(END_OF_TEXT).ids + words
        said = tokenizer.encode(language.full_caption(scene) + "\n").ids
        return given + said, [-100] * len(given) + said
    if round_.strange and rng.random() < round_.strange:
        # As the tokens of an image without a scene may be: whatever they are, they are no words of a map.
        known = {tokenizer.token_to_id(f"Ġ{word}") for word in language.map_words()}
        words = rng.choices([i for i in range(300, tokenizer.get_vocab_size()) if i not in known], k=len(words))
        asked = [talk.detail(scene, rng)[0], *(question for question, _ in talk.turns(scene, rng, 3))]
        pairs = [(question, unknown.SENTENCE) for question in asked]
        return _with_labels(CHATML.render(_told(IMAGE_TOKEN, pairs)), tokenizer, words)
    facts = IMAGE_TOKEN if kind < round_.captions + round_.maps else sentences(scene, rng)
    return _with_labels(CHATML.render(conversation(scene, rng, facts=facts, types=round_.types)), tokenizer, words)


def _with_labels(rendered: Rendered, tokenizer: Tokenizer, words: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; `words` take the place of `<image>`."""
    before, _, after = rendered.text.rpartition(IMAGE_TOKEN)
    ids = [*tokenizer.encode(before).ids, *words] if before else []
    labels = [-100] * len(ids)
    encoded = tokenizer.encode(after)
    shift = len(rendered.text) - len(after)
    learned = [range(start - shift, end - shift) for start, end in rendered.spans]
    span = 0
    for token, (left, right) in zip(encoded.ids, encoded.offsets, strict=True):
        while span < len(learned) and left >= learned[span].stop:
            span += 1
        inside = span < len(learned) and learned[span].start <= left and right <= learned[span].stop
        labels.append(token if inside else -100)
    return ids + encoded.ids, labels

"""The tiny LLaMA of nano and its tokenizer, trained on text alone: written scenes, and questions about them.

It never meets an image. Three things that it reads make it easy to give eyes afterwards:

- Scenes as sentences, in any order, and questions about them: language and the forms of questions and answers.
- Scenes as maps (`language.scene_map`): 6 x 6 words in reading order, one word for each patch, as the tower will give
  one token for each patch. A word such as "largeredcircletopleft" is a single token and holds all that an image's
  token will hold. A LLaMA that has only read sentences looks a shape up over eight tokens and has no circuit for one
  token that says it all.
- The loss counts what is answered, not what is given: the facts are random, and learning their noise drowns the
  answers.

Shapes in the comments: B texts, S tokens.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qllava.conversation import CHATML, IMAGE_TOKEN, Conversation, Rendered, Turn
from qllava.nano import language, precision, talk
from qllava.nano.kept import Kept
from qllava.nano.precision import Muon
from qllava.nano.scenes import COLOURS, FORMS, PLACES, SIZES, Scene, Shape, sample_scene

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 3072
LENGTH = 224
"""Tokens of a text: facts and about ten questions."""
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
        texts.append(" " + CHATML.render(conversation(scene, rng, facts=sentences(scene, rng))).text)
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
    scene: Scene, rng: random.Random, *, facts: str, count: int = 12, types: tuple[str, ...] = language.TYPES
) -> Conversation:
    """Facts, and `count` questions about them with their answers; now and then a description or reasons instead."""
    pairs = talk.turns(scene, rng, count, types)
    if rng.random() < 0.15:
        pairs = [talk.detail(scene, rng), *pairs[: count // 2]]
    elif rng.random() < 0.2:
        pairs = [talk.reasoning(scene, rng), *pairs[: count // 2]]
    pairs[0] = (f"{facts}\n{pairs[0][0]}", pairs[0][1])
    return Conversation(tuple(t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))))


def copying(rng: random.Random) -> Conversation:
    """What stands at each of a few places, in words that mean nothing, and questions that are answered by them.

    The head is the table of embeddings: without these it would never have said most of its tokens, and tuning, which
    leaves it as it is, could not bring it to say them.
    """
    there = {place: _meaningless(rng) for place in rng.sample(PLACES, rng.randint(1, 4))}
    pairs = [(f"What is {language.AT[place]}?", words) for place, words in there.items()]
    rng.shuffle(pairs)
    facts = "\n".join(f"{place}: {words}" for place, words in there.items())
    pairs[0] = (f"{facts}\n{pairs[0][0]}", pairs[0][1])
    return Conversation(tuple(t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))))


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


# The first round leaves each of the 972 words of the maps to itself, and each is met too seldom: after it, presence and
# count were answered always, places in 30 % of cases, and questions that compare two shapes no better than by a coin.
# In the second the words share what they are made of, and it asks mostly what was not yet known; after it, relations
# alone were a coin still. In the third a place is also a row and a column, which is what relations ask about, and there
# are words to repeat that mean nothing: the head must be able to say what its tuning will teach it to say.
_WORD = ("size", "colour", "form", "place")
ROUNDS = (
    Round(3_600, 32, 2e-3, 2e-3, 0.15, 0.55, language.TYPES, shared=()),
    Round(
        4_000, 16, 1.5e-3, 1.5e-3, 0.05, 0.8,
        ("relation", "comparison", "place") * 3 + ("colour", "form") * 2 + ("size", "count", "presence"), shared=_WORD,
    ),
    Round(
        6_000, 16, 2e-3, 2e-3, 0.05, 0.75,
        ("relation",) * 5 + ("comparison", "place", "colour") * 2 + ("form", "size", "count", "presence"),
        shared=(*_WORD, "row", "column"), copies=0.1,
    ),
)  # fmt: skip


# A smaller LLaMA for ablations: every second layer of nano's is left out, and the rest learns to do without.
SMALL_ROUND = Round(
    1_000, 16, 1e-3, 1e-3, 0.1, 0.75, language.TYPES, shared=(*_WORD, "row", "column"), copies=0.1
)  # fmt: skip


def text(rng: random.Random, tokenizer: Tokenizer, round_: Round = ROUNDS[0]) -> tuple[list[int], list[int]]:
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


def build(vocab_size: int) -> LlamaForCausalLM:
    """The untrained LLaMA: every width a multiple of 64, so that NF4 and GGUF blocks fit."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _compiled(body: torch.nn.Module) -> Callable[..., Any]:
    """The module as `torch.compile` makes it; as it is where the C++ compiler that torch would call is not there.

    torch calls $CXX, else the one that its platform usually has. It would look for it at the first step only and fail.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    program, *_ = shlex.split(os.environ.get("CXX") or usual)
    if shutil.which(program) is None:
        return body
    compiled: Callable[..., Any] = torch.compile(body, dynamic=False)
    return compiled


class Words:
    """Embeddings in which the word of a map is the sum of vectors for what it is made of: size, colour, form, place.

    What is learned about "top left" from one word then holds for all 108 that contain it. `fold` writes the sums into
    the model's own table, so that what is saved is a plain LLaMA.
    """

    def __init__(
        self, table: torch.nn.Embedding, tokenizer: PreTrainedTokenizerFast, attributes: tuple[str, ...]
    ) -> None:
        """Args: the model's table (V, D), which is also its head; it goes on learning for all other words.

        `attributes` are of "size", "colour", "form", "place", "row" and "column".
        """
        self.table = table
        columns: dict[tuple[str, str | int], int] = {}
        rows: dict[int, list[int]] = {}
        for size, colour, form, cell in product(SIZES, COLOURS, FORMS, range(len(PLACES))):
            shape = Shape(form, colour, size, cell, x=0, y=0, angle=0)
            (row,) = tokenizer(f" {language.word_of(shape)}")["input_ids"]
            rows[row] = [columns.setdefault((a, getattr(shape, a)), len(columns)) for a in attributes]
        self.parts = torch.zeros(table.num_embeddings, len(columns))
        for row, its in rows.items():
            self.parts[row, its] = 1.0
        words = self.parts.sum(1) > 0
        self.others = (~words).float()[:, None]
        # The shortest of all solutions: what places share goes to their rows and columns.
        fitted = torch.linalg.lstsq(self.parts[words], table.weight.detach()[words], driver="gelsd").solution
        self.vectors = torch.nn.Parameter(fitted)

    def weight(self) -> torch.Tensor:
        """(V, D): the table in use."""
        summed: torch.Tensor = self.table.weight * self.others + self.parts @ self.vectors
        return summed

    @torch.no_grad()
    def fold(self) -> None:
        """Write the sums into the model's table."""
        self.table.weight.copy_(self.weight())


def _rows(texts: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of (B, LENGTH): cut or padded at the end; one shape for all batches, so it is compiled once."""
    ids = [(i + [0] * LENGTH)[:LENGTH] for i, _ in texts]
    labels = [(given + [-100] * LENGTH)[:LENGTH] for _, given in texts]
    return torch.tensor(ids), torch.tensor(labels)


def train(
    tokenizer: PreTrainedTokenizerFast,
    rounds: tuple[Round, ...] = ROUNDS,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    kept: Path | None = None,
) -> LlamaForCausalLM:
    """Train the LLaMA on `text`, round after round.

    Args:
        tokenizer: What `train_tokenizer` returns.
        rounds: In their order.
        seed: Of the weights and the texts.
        log: Takes a line about each 50th step.
        kept: File that the state is kept in, and resumed from; None: the training cannot be resumed.

    Returns:
        The model in evaluation mode.
    """
    torch.manual_seed(seed)
    model = build(len(tokenizer))
    state = Kept(kept, log)
    for number, round_ in enumerate(rounds):
        train_round(model, tokenizer, round_, random.Random(f"text-{seed + number}"), log, kept=state, number=number)
    model.eval()
    return model


def shorten(model: LlamaForCausalLM) -> None:
    """Leave out every second decoder layer, in place, keeping the first of each pair."""
    kept = torch.nn.ModuleList(list(model.model.layers)[::2])
    for place, layer in enumerate(kept):
        attention: Any = layer.self_attn
        attention.layer_idx = place  # its place in the cache of keys and values
    model.model.layers = kept
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[::2]


def train_round(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    round_: Round,
    rng: random.Random,
    log: Callable[[str], None],
    *,
    kept: Kept | None = None,
    number: int = 0,
) -> None:
    """Train one round, in place: fp32 weights, products by `precision`; Muon for the matrices, AdamW for the rest.

    kept: Where the state of this round, the `number`th, is kept; a round that it says is finished does nothing.
    """
    kept = kept or Kept(None, log)
    if (first := kept.begins(number)) is None:
        return
    if first:
        model.load_state_dict(kept.state["model"])
    body = _compiled(model.model)
    table: torch.nn.Embedding = model.model.embed_tokens
    words = Words(table, tokenizer, round_.shared) if round_.shared else None
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    others += [words.vectors] if words else []
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, round_.muon_lr),
        torch.optim.AdamW(others, lr=round_.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    one_cycle = partial(OneCycleLR, total_steps=round_.steps, pct_start=0.03, cycle_momentum=False)
    schedules = [one_cycle(o, max_lr=o.defaults["lr"]) for o in optimizers]
    resumed: list[Any] = [*optimizers, *schedules]
    if first:
        rng.setstate(kept.state["rng"])
        if words:
            words.vectors.data.copy_(kept.state["vectors"])
        for one, its in zip(resumed, kept.state["optimizers"], strict=True):
            one.load_state_dict(its)
    for step in tqdm(range(first, round_.steps), desc="llama", initial=first, total=round_.steps):
        ids, labels = _rows([text(rng, tokenizer.backend_tokenizer, round_) for _ in range(round_.batch)])
        learned = labels[:, 1:] != -100
        # Padding stands at the end and attention is causal: nothing real ever sees it, so no mask is needed.
        with precision.fast(), sdpa_kernel(SDPBackend.MATH):
            weight = words.weight() if words else table.weight
            embedded = torch.nn.functional.embedding(ids, weight)
            hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1][learned]
            logits = torch.nn.functional.linear(hidden, weight).float()  # the head is the table
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][learned])
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedules, strict=True):
            o.step()
            s.step()
        if step % 50 == 49:
            right = (logits.argmax(-1) == labels[:, 1:][learned]).float().mean()
            log(f"step {step + 1}: loss {loss.item():.4f}, right {right.item():.3f} of {learned.sum().item()}")
        if kept.due():
            kept.write(
                {
                    "round": number, "step": step + 1, "rng": rng.getstate(), "model": model.state_dict(),
                    "vectors": words.vectors.data if words else None,
                    "optimizers": [one.state_dict() for one in resumed],
                }
            )  # fmt: skip
    if words:
        words.fold()

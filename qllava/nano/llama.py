"""The tiny LLaMA of nano, trained on text alone (`texts`), without images.

Only the answers are learned, not the facts before them: facts are random, and their loss would outweigh the answers'.

Shapes in the comments: B texts, S tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qllava.nano import language, precision, texts
from qllava.nano.kept import Kept
from qllava.nano.precision import Muon
from qllava.nano.scenes import COLOURS, FORMS, PLACES, SIZES, Shape
from qllava.nano.texts import Round

LENGTH = 224
"""Tokens of a text: facts and about ten questions."""
# A place is also a row and a column, which is what relations ask about; without them relations stayed at chance. What
# needs two shapes is asked most. Words to repeat that mean nothing are there because the head must be able to say what
# its tuning will teach it to say.
_WORD = ("size", "colour", "form", "place", "row", "column")
ROUNDS = (
    Round(
        11_500, 16, 2e-3, 2e-3, 0.06, 0.82,
        ("relation",) * 3 + ("comparison", "place", "count", "presence") * 2 + ("colour", "form", "size"),
        shared=_WORD, copies=0.08, strange=0.03,
    ),
)  # fmt: skip


# A smaller LLaMA for ablations: every second layer of nano's is left out, and the rest learns to do without.
SMALL_ROUND = Round(
    1_000, 16, 1e-3, 1e-3, 0.1, 0.75, language.TYPES, shared=_WORD, copies=0.1
)  # fmt: skip


def build(vocab_size: int) -> LlamaForCausalLM:
    """Return the untrained LLaMA: every width is a multiple of 64, so that NF4 and GGUF blocks fit."""
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


class Words:
    """Embeddings in which a map's word is the sum of vectors for its size, colour, form and place.

    What is learned about "top left" from one word then applies to all 108 words that contain it. `fold` writes the sums
    into the model's own table, so a plain LLaMA is saved.
    """

    def __init__(
        self, table: torch.nn.Embedding, tokenizer: PreTrainedTokenizerFast, attributes: tuple[str, ...]
    ) -> None:
        """Fit the vectors to the words of the table.

        Args:
            table: The model's embeddings (V, D), which are also its head. All other words go on learning in it.
            tokenizer: The tokenizer of the table.
            attributes: Of "size", "colour", "form", "place", "row" and "column".
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
        """Return the table in use, (V, D)."""
        summed: torch.Tensor = self.table.weight * self.others + self.parts @ self.vectors
        return summed

    @torch.no_grad()
    def fold(self) -> None:
        """Write the sums into the model's table."""
        self.table.weight.copy_(self.weight())


def _rows(drawn: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels (B, LENGTH), cut or padded at the end; batches of one shape are compiled once."""
    ids = [(i + [0] * LENGTH)[:LENGTH] for i, _ in drawn]
    labels = [(given + [-100] * LENGTH)[:LENGTH] for _, given in drawn]
    return torch.tensor(ids), torch.tensor(labels)


def train(
    tokenizer: PreTrainedTokenizerFast,
    rounds: tuple[Round, ...] = ROUNDS,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    kept: Path | None = None,
) -> LlamaForCausalLM:
    """Train the LLaMA on `texts`, round after round.

    Args:
        tokenizer: What `texts.train_tokenizer` returns.
        rounds: The rounds in their order.
        seed: Seed of the weights and the texts.
        log: Called with a line about every 50th step.
        kept: File for the state, from which training is resumed; None if it need not be resumed.

    Returns:
        The model in evaluation mode.
    """
    torch.manual_seed(seed)
    model = build(len(tokenizer))
    state = Kept(kept, log, f"seed {seed}, {rounds}")
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


def _optimizers(
    model: LlamaForCausalLM, words: Words | None, round_: Round
) -> tuple[list[torch.optim.Optimizer], list[OneCycleLR]]:
    """Muon for the matrices and AdamW for the rest, each with its schedule of the learning rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    others += [words.vectors] if words else []
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, round_.muon_lr),
        torch.optim.AdamW(others, lr=round_.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    one_cycle = partial(OneCycleLR, total_steps=round_.steps, pct_start=0.03, cycle_momentum=False)
    return optimizers, [one_cycle(o, max_lr=o.defaults["lr"]) for o in optimizers]


def _predicted(
    body: Callable[..., Any], words: Words | None, table: torch.nn.Embedding, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (N, V) of the N tokens that are learned, and the ids (N,) that are right."""
    learned = labels[:, 1:] != -100
    # Padding stands at the end and attention is causal: nothing real ever sees it, so no mask is needed.
    with precision.fast(), sdpa_kernel(SDPBackend.MATH):
        weight = words.weight() if words else table.weight
        embedded = torch.nn.functional.embedding(ids, weight)
        hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1][learned]
        logits = torch.nn.functional.linear(hidden, weight).float()  # the head is the table
    return logits, labels[:, 1:][learned]


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

    Args:
        tokenizer: What `texts.train_tokenizer` returns.
        round_: Steps, rates and mixture of texts.
        rng: Draws the texts.
        log: Called with a line about every 50th step.
        kept: Where the state is kept; a round that is finished there is skipped.
        number: Number of the round, from 0.
    """
    kept = kept or Kept(None, log)
    if (first := kept.begins(number)) is None:
        return
    if first:
        model.load_state_dict(kept.state["model"])
    body = precision.compiled(model.model)
    table: torch.nn.Embedding = model.model.embed_tokens
    words = Words(table, tokenizer, round_.shared) if round_.shared else None
    optimizers, schedules = _optimizers(model, words, round_)
    resumed: list[Any] = [*optimizers, *schedules]
    if first:
        rng.setstate(kept.state["rng"])
        if words:
            words.vectors.data.copy_(kept.state["vectors"])
        for one, its in zip(resumed, kept.state["optimizers"], strict=True):
            one.load_state_dict(its)
    for step in tqdm(range(first, round_.steps), desc="llama", initial=first, total=round_.steps):
        ids, labels = _rows([texts.text(rng, tokenizer.backend_tokenizer, round_) for _ in range(round_.batch)])
        logits, wanted = _predicted(body, words, table, ids, labels)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedules, strict=True):
            o.step()
            s.step()
        if step % 50 == 49:
            right = (logits.argmax(-1) == wanted).float().mean()
            log(f"step {step + 1}: loss {loss.item():.4f}, right {right.item():.3f} of {len(wanted)}")
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

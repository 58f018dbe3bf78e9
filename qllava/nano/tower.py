"""The tiny tower of nano, trained with open_clip's own CoCa model and loss on drawn scenes and their captions.

Why CoCa and not CLIP alone: the contrastive loss is content to tell images apart by colour and place and lets go of
the form (a linear probe on such a tower read 0.46 of the forms). A caption that must name every shape cannot be written
without it.

Shapes in the comments: B images, T caption tokens, P patches (36), D width (128).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from open_clip.coca_model import CoCa
from open_clip.loss import CoCaLoss
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from qllava import workers
from qllava.nano import precision
from qllava.nano.kept import Kept
from qllava.nano.language import full_caption
from qllava.nano.scenes import SIZE, nameless_colour, render, sample_scene

PATCH = 16
WIDTH = 128
LAYERS = 6
CONTEXT = 48
"""Caption tokens at most: five shapes of at most nine words and marks, with the start and the end."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_PAD, _START = 0, 1


def draw(seeds: list[int], nameless: float = 0.0, full: float = 1.0) -> tuple[np.ndarray, list[str]]:
    """Draw scenes of the training split by seed, as (B, SIZE, SIZE, 3) bytes and captions.

    Args:
        seeds: One for each scene.
        nameless: Share of scenes that are painted in colours without a name; their captions say no colours.
        full: Share of the others whose captions say colours and forms; the rest say no forms.
    """
    images, captions = [], []
    for seed in seeds:
        rng = random.Random(f"tower-{seed}")
        scene = sample_scene(rng)
        odd = rng.random() < nameless
        images.append(np.asarray(render(scene, [nameless_colour(rng) for _ in scene.shapes] if odd else None)))
        captions.append(full_caption(scene, colours=not odd, forms=odd or rng.random() < full))
    return np.stack(images), captions


def pixels(images: np.ndarray) -> torch.Tensor:
    """(B, SIZE, SIZE, 3) bytes -> (B, 3, SIZE, SIZE) normalized floats, as the image processor gives them."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def vocabulary() -> dict[str, int]:
    """Words of the captions -> ids. The end mark's id is the highest: there open_clip pools the text."""
    words: set[str] = set()
    rng = random.Random(0)
    for _ in range(2000):
        scene = sample_scene(rng)
        words.update(_words(full_caption(scene)), _words(full_caption(scene, forms=False)))
    out = {word: i for i, word in enumerate(sorted(words), start=2)}
    return {**out, "<end>": len(out) + 2}


def _words(caption: str) -> list[str]:
    return caption.replace(",", " ,").split()


def tokens(captions: list[str], ids: dict[str, int]) -> torch.Tensor:
    """Captions -> (B, CONTEXT) ids with start, end and padding."""
    out = torch.full((len(captions), CONTEXT), _PAD)
    for row, caption in zip(out, captions, strict=True):
        line = [_START, *(ids[w] for w in _words(caption)), ids["<end>"]]
        row[: len(line)] = torch.tensor(line)
    return out


def build(vocab_size: int) -> CoCa:
    """The untrained CoCa: a ViT without attentional pooling, so that its trunk is a plain CLIP tower."""
    model = CoCa(
        embed_dim=WIDTH,
        multimodal_cfg={"width": WIDTH, "context_length": CONTEXT, "vocab_size": vocab_size, "layers": 1, "heads": 4},
        text_cfg={
            "width": WIDTH,
            "context_length": CONTEXT,
            "vocab_size": vocab_size,
            "layers": 1,
            "heads": 4,
            "output_tokens": True,
        },
        vision_cfg={
            "image_size": SIZE,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": LAYERS,
            "head_width": 32,
            "mlp_ratio": 3.0,
            "output_tokens": True,
        },
        pad_id=_PAD,
    )
    # open_clip leaves this projection as torch.empty made it.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=WIDTH**-0.5)
    # The model says vocab_size through embed_dim of the decoder: check rather than trust.
    if model.text_decoder.text_projection.shape != (WIDTH, vocab_size):
        raise ValueError(f"open_clip's CoCa decodes to {tuple(model.text_decoder.text_projection.shape)}")
    return model


def _batches(
    images: np.ndarray, text: torch.Tensor, size: int, steps: int, rng: np.random.Generator, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(len(images))])
        chosen, order = order[:size], order[size:]
        if step >= first:
            yield pixels(images[chosen]), text[chosen]


@dataclass(frozen=True)
class Round:
    """One cycle of the learning rate over scenes of its own."""

    scenes: int
    """How many are drawn for it."""
    steps: int
    """Optimizer steps."""
    lr: float
    """The highest learning rate; it falls to nothing along a cosine."""
    nameless: float
    """Share of scenes that are painted in colours without a name (`draw`)."""
    full: float
    """Share of the other scenes whose captions say colours and forms (`draw`)."""


# A caption that says colour and form together teaches which forms a colour never has: after such captions a probe on
# the patches read 24 % of the forms of pairs that the tower had never met, and 54 % once half of the scenes had colours
# that have no name. So most captions say one of the two: forms are learned from colours that have no name and come in
# every form, the named colours from captions that say no form.
ROUNDS = (Round(100_000, 10_500, 1.5e-3, 0.6, 0.1),)


def train(
    rounds: tuple[Round, ...] = ROUNDS,
    *,
    batch: int = 128,
    seed: int = 0,
    log: Callable[[str], None] = print,
    kept: Path | None = None,
) -> CoCa:
    """Train the tower's CoCa.

    Args:
        rounds: The rounds in their order.
        batch: Images of a step.
        seed: Seed of the weights, the scenes and their order.
        log: Called with a line about every 100th step.
        kept: File for the state, from which training is resumed; None if it need not be resumed.

    Returns:
        The model in evaluation mode.
    """
    torch.manual_seed(seed)
    ids = vocabulary()
    model = build(len(ids) + 2)
    state = Kept(kept, log, f"seed {seed}, batches of {batch}, {rounds}")
    drawn = seed * 1_000_000
    for number, round_ in enumerate(rounds):
        scenes = range(drawn, drawn + round_.scenes)
        drawn += round_.scenes
        if state.begins(number) is not None:
            images, text = _draw_all(scenes, ids, round_.nameless, round_.full)
            train_round(model, images, text, round_, batch=batch, seed=seed, log=log, kept=state, number=number)
    return model.eval()


def _draw_all(seeds: range, ids: dict[str, int], nameless: float, full: float) -> tuple[np.ndarray, torch.Tensor]:
    """Return the images and tokenized captions of scenes, drawn in parallel."""
    chunks = [list(seeds[k : k + 500]) for k in range(0, len(seeds), 500)]
    with workers.pool() as pool:
        drawn = list(tqdm(pool.map(draw, chunks, repeat(nameless), repeat(full)), total=len(chunks), desc="scenes"))
    images = np.concatenate([p for p, _ in drawn])
    return images, tokens([caption for _, part in drawn for caption in part], ids)


def train_round(
    model: CoCa,
    images: np.ndarray,
    text: torch.Tensor,
    round_: Round,
    *,
    batch: int,
    seed: int,
    log: Callable[[str], None],
    kept: Kept | None = None,
    number: int = 0,
) -> None:
    """Train one round, in place: fp32 weights, products by `precision`.

    kept: Where the state of this round, the `number`th, is kept and found.
    """
    kept = kept or Kept(None, log)
    first = kept.begins(number) or 0
    loss_of = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, pad_id=_PAD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=round_.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, round_.lr, total_steps=round_.steps, pct_start=0.05)
    if first:
        for one, its in zip((model, optimizer, schedule), kept.state["parts"], strict=True):
            one.load_state_dict(its)
    forward = precision.compiled(model)
    batches = _batches(images, text, batch, round_.steps, np.random.default_rng(seed), first)
    for step, (x, y) in enumerate(tqdm(batches, initial=first, total=round_.steps, desc="tower"), start=first):
        # torch's flash attention on the CPU takes ten times as long backwards as the plain product at this size.
        with precision.fast(), sdpa_kernel(SDPBackend.MATH):
            out = forward(x, y)
        features = out["image_features"].float(), out["text_features"].float()
        clip, caption = loss_of(*features, out["logits"].float(), out["labels"], out["logit_scale"])
        optimizer.zero_grad(set_to_none=True)
        (clip + caption).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log(f"step {step + 1}: contrastive {clip.item():.3f} caption {caption.item() / 2:.4f}")
        if kept.due():
            parts = [one.state_dict() for one in (model, optimizer, schedule)]
            kept.write({"round": number, "step": step + 1, "parts": parts})

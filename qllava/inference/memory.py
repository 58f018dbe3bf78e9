"""Bytes that answering takes in addition to a model's weights, computed from its config without a model.

Answering a batch has four phases, and the largest of them decides:

| phase | contents |
|---|---|
| tower | pixels, activations of the vision tower |
| projector | pixels, the tower's outputs, activations of the projector |
| prefill | remaining image tensors, key-value cache of the prompts, activations of one decoder layer |
| decoding | remaining image tensors, key-value cache of prompts and answers, logits |

The counts follow transformers' `generate` with a `DynamicCache`: prompts are padded to the longest of the batch, the
cache grows by concatenation (so that one tensor of one layer exists twice for a moment), the prefill computes logits
for the last position only, and the tower's outputs live until the last token. The peaks within a decoder layer were
read from `modeling_llama` (Mistral's is the same); the tests compare them with torch's allocations. Attention is
torch's fused one, as everywhere in qllava.

Units: bytes. B prompts, S tokens of the longest, N new tokens, P images of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaConfig

from qllava.image_layout import ImageLayout

_FP32 = 4
_IDS = 4 * 8
"""Bytes per token for ids: as given and as extended, in the mask, and as position."""


@dataclass(frozen=True)
class Answering:
    """Bytes of one batch of prompts, by phase and by part."""

    cache: int
    """Keys and values after the last token has been generated."""
    logits: int
    """Logits of the next token: the previous step's in fp32, this step's in the model's type and in fp32."""
    pixels: int
    """The images as the processor made them, in fp32."""
    tower: int
    """Peak while the vision tower and the projector encode the images."""
    prefill: int
    """Peak while the prompts are processed."""
    decoding: int
    """Peak while the last token is generated."""
    workspace: int = 0
    """The largest 4-bit weight, dequantized; included in `prefill` and `decoding`."""

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.tower, self.prefill, self.decoding)


def answering(
    config: LlavaConfig,
    lengths: Sequence[int],
    new_tokens: int,
    images: Sequence[int],
    dtype: torch.dtype,
    *,
    training: bool = False,
    load_in_4bit: bool = False,
    sampling: bool = False,
) -> Answering:
    """Return the bytes that one batch of prompts takes in addition to the weights.

    Args:
        config: Shapes of the model.
        lengths: Tokens of each prompt, image tokens included.
        new_tokens: Maximum tokens of an answer.
        images: Number of images of each prompt.
        dtype: Type of the language model's computation.
        training: Whether LoRA and the projector are held in fp32 besides the weights, as during a run.
        load_in_4bit: Whether the decoder's weights are 4-bit and dequantized one at a time.
        sampling: Whether answers are sampled, which takes three more tensors of logits.

    Returns:
        The bytes; 0 everywhere for a batch without prompts.
    """
    if not lengths:
        return Answering(0, 0, 0, 0, 0, 0)
    shape, batch, longest = _Shape.of(config, dtype, training), len(lengths), max(lengths)
    padded = min(lengths) < longest
    seen = sum(images)
    pixels = seen * shape.pixels
    last = longest + max(new_tokens, 1) - 1
    ids = batch * last * _IDS
    held = pixels + seen * shape.image_outputs + ids
    tower = pixels + seen * max(shape.tower, shape.projector) + ids if seen else 0
    by_token = batch * shape.cache_of_a_layer
    before = held + seen * shape.features + shape.layers * by_token * longest
    mask = batch * longest**2 if padded else 0
    layer = batch * longest * shape.outside_attention + mask
    attention = batch * longest * shape.attention(padded) + mask * (1 + shape.size) - by_token * longest
    workspace = shape.largest_weight if load_in_4bit else 0
    cache = shape.layers * by_token * last
    scores = batch * shape.vocabulary
    logits = scores * (2 * _FP32 + shape.size + (3 * _FP32 if sampling else 0))
    growing = scores * _FP32 + by_token * last // 2 + workspace
    return Answering(
        cache=cache,
        logits=logits,
        pixels=pixels,
        tower=tower,
        prefill=before + max(layer, attention) + workspace,
        decoding=held + cache + max(logits, growing),
        workspace=workspace,
    )


def prompts_that_fit(
    config: LlavaConfig,
    lengths: Sequence[int],
    new_tokens: int,
    images: Sequence[int],
    dtype: torch.dtype,
    free_bytes: int,
    *,
    training: bool = False,
    load_in_4bit: bool = False,
    sampling: bool = False,
) -> int:
    """Return how many of the prompts, from the first, can be answered in one batch.

    Args:
        config: See `answering`.
        lengths: Tokens of each prompt, in the order of answering (the longest first wastes least).
        new_tokens: Maximum tokens of an answer.
        images: Number of images of each prompt.
        dtype: Type of the language model's computation.
        free_bytes: Bytes that may be allocated in addition to those allocated now.
        training: See `answering`.
        load_in_4bit: See `answering`.
        sampling: See `answering`.

    Returns:
        The number of prompts; 0 if not even the first one fits.
    """
    fits, over = 0, len(lengths) + 1  # memory grows with the batch: `fits` prompts fit, `over` do not
    while over - fits > 1:
        middle = (fits + over) // 2
        need = answering(
            config,
            lengths[:middle],
            new_tokens,
            images[:middle],
            dtype,
            training=training,
            load_in_4bit=load_in_4bit,
            sampling=sampling,
        )
        if need.peak <= free_bytes:
            fits = middle
        else:
            over = middle
    return fits


@dataclass(frozen=True)
class _Shape:
    """Sizes from a config in bytes, for one token of one prompt, or for one image."""

    text: Any
    """Config of the language model."""
    size: int
    """Bytes of one value in the model's type."""
    training: bool
    """Whether LoRA and the projector are held in fp32."""
    pixels: int
    """Bytes of an image's pixels."""
    tower: int
    """Peak of the vision tower."""
    projector: int
    """Peak of the projector."""
    image_outputs: int
    """Tensors of an image that `generate` keeps: two hidden states of the tower, and the features."""
    features: int
    """Copy of an image's features in the model's type, during the prefill."""

    @classmethod
    def of(cls, config: LlavaConfig, dtype: torch.dtype, training: bool) -> _Shape:
        """Read the sizes from the config."""
        text: Any = config.get_text_config()
        vision: Any = config.vision_config
        size = dtype.itemsize
        image = ImageLayout.of_config(config)
        seen, tokens = image.tokens, image.outputs
        chosen = config.vision_feature_layer
        chosen = 1 if isinstance(chosen, int) else len(chosen)
        own = _FP32 if training else size
        hidden = size * tokens * vision.hidden_size
        inner = size * tokens * vision.intermediate_size
        # x * sigmoid(1.702 x) takes three tensors, one fused function two.
        inner *= 3 if vision.hidden_act == "quick_gelu" else 2
        features = own * seen * text.hidden_size
        given = own * seen * vision.hidden_size * chosen
        return cls(
            text=text,
            size=size,
            training=training,
            pixels=_FP32 * vision.num_channels * vision.image_size**2,
            tower=(3 + chosen) * hidden + max(inner, 3 * hidden),
            projector=(1 + chosen) * hidden + (given if training or chosen > 1 else 0) + 2 * features,
            image_outputs=(1 + chosen) * hidden + features,
            features=size * seen * text.hidden_size + (features if own != size else 0),
        )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.text.num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        """Number of logits of a token."""
        return int(self.text.vocab_size)

    @property
    def width(self) -> int:
        """Number of values of a hidden state."""
        return int(self.text.hidden_size)

    @property
    def head(self) -> int:
        """Number of values of an attention head."""
        return int(getattr(self.text, "head_dim", None) or self.width // self.text.num_attention_heads)

    @property
    def cache_of_a_layer(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        return int(2 * self.size * self.text.num_key_value_heads * self.head)

    @property
    def largest_weight(self) -> int:
        """Bytes of an MLP weight, dequantized."""
        return int(self.size * self.width * self.text.intermediate_size)

    @property
    def _around(self) -> int:
        """Bytes held throughout a layer: the embeddings, the residual, the sines and cosines."""
        return self.size * (2 * self.width + 2 * self.head)

    def _lora(self, given: int, out: int) -> int:
        """Return the bytes that LoRA in fp32 adds to the output of a product: its input, and its output twice."""
        return (_FP32 * given if self.size != _FP32 else 0) + 2 * _FP32 * out if self.training else 0

    @property
    def outside_attention(self) -> int:
        """Peak of a layer's norms and its MLP."""
        width, inner, size = self.width, int(self.text.intermediate_size), self.size
        norm = 2 * _FP32 * width
        up = max(3 * size * inner, 2 * size * inner + self._lora(width, inner))
        down = size * (inner + width) + self._lora(inner, width)
        # The layer's input, and the residual after attention.
        return self._around + size * width + max(norm, size * width + max(up, down))

    def attention(self, padded: bool) -> int:
        """Peak of a layer's attention, its own keys and values included."""
        heads = int(self.text.num_attention_heads)
        query, pair, width = self.size * heads * self.head, self.cache_of_a_layer, self.size * self.width
        rotated = max(4 * query + pair, 2 * query + pair + 3 * pair // 2)
        stored = query + 2 * pair
        # If a mask is needed and there are fewer keys than queries, the keys are repeated.
        repeated = 2 * query if padded and self.text.num_key_value_heads < heads else 0
        looked = 2 * query + pair + repeated + _FP32 * heads
        value = query + pair + self._lora(self.width, self.text.num_key_value_heads * self.head)
        out = query + pair + width + self._lora(heads * self.head, self.width)
        return self._around + width + max(rotated, stored, looked, value, out)

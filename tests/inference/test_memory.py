"""What answering is counted to take, compared with what torch allocates while a real model answers on the CPU."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from qllava.image_layout import ImageLayout
from qllava.inference.generate import continue_prompts
from qllava.inference.memory import answering, prompts_that_fit
from qllava.models.adapter import add_lora
from qllava.models.assemble import Assembled
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training.memory.fake import Tracker, llava_of


def shapes(
    *, width: int = 128, inner: int = 352, heads: int = 4, pairs: int = 4, layers: int = 3, vocabulary: int = 2000
) -> LlavaConfig:
    """A small LLaVA; 64 tokens an image. pairs: heads of keys and values."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        ),
        image_token_index=vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def siglip() -> LlavaConfig:
    """The same with a tower that has no class token and another activation."""
    config = shapes()
    config.vision_config = SiglipVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=8
    )
    config.vision_feature_select_strategy = "full"
    return config


class _Tracker(Tracker):
    """Notes the most bytes of logits that lived at one time, too."""

    most_logits = 0

    def _note(self) -> None:
        super()._note()
        self.most_logits = max(self.most_logits, self.live["logits"])


def measured(
    config: LlavaConfig, lengths: list[int], new_tokens: int, images: list[int], dtype: torch.dtype, lora_r: int = 0
) -> dict[str, int]:
    """Bytes beyond the weights in each phase, and of the cache and of logits, while a real model answers."""
    model: Any = LlavaForConditionalGeneration(copy.deepcopy(config)).to(dtype).eval()
    if lora_r:
        model.model.multi_modal_projector.float()
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        recipe = Recipe("", None, None, "mlp2x_gelu", -2, "pad", "", False)
        model = add_lora(Assembled(model, None, recipe), Lora(lora_r, lora_r)).eval()  # type: ignore[arg-type]
    llava, each, side = llava_of(model), ImageLayout.of_config(config).tokens, config.vision_config.image_size
    tracker = _Tracker(config.text_config.vocab_size)
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.put(tensor, "weights")
    weights, cache = tracker.live.total(), 0
    tracker.phase = "tower"

    def before(_: Any, args: Any, kwargs: Any) -> None:
        tracker.phase = "prefill" if kwargs["inputs_embeds"].shape[1] > 1 else "decoding"

    def after(_: Any, args: Any, out: Any) -> None:
        nonlocal cache
        layers = out.past_key_values.layers
        cache = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))

    llava.model.multi_modal_projector.register_forward_hook(lambda *_: setattr(tracker, "phase", "between"))
    llava.model.language_model.register_forward_pre_hook(before, with_kwargs=True)
    llava.model.language_model.register_forward_hook(after)
    prompts = [
        [config.image_token_id] * (each * seen) + [5] * (length - each * seen)
        for length, seen in zip(lengths, images, strict=True)
    ]
    pixels = [torch.zeros(seen, 3, side, side) if seen else None for seen in images]
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    with tracker:
        continue_prompts(model, prompts, pixels, settings)
    found = {phase: parts.total() - weights for phase, parts in tracker.peaks.items()}
    return {**found, "cache": cache, "logits": tracker.most_logits}


CASES = {
    "one question": (shapes(), [100], 8, [1]),
    "a batch with padding": (shapes(), [300, 200, 90], 20, [2, 1, 1]),
    "grouped queries, with padding": (shapes(pairs=1), [300, 200, 90], 20, [2, 1, 1]),
    "grouped queries, equal lengths": (shapes(pairs=2, layers=6), [200, 200], 8, [1, 1]),
    "text alone, long answers": (shapes(vocabulary=6000), [40] * 4, 150, [0] * 4),
    "many images": (shapes(width=64, inner=96, heads=2, pairs=2), [270], 8, [4]),
    "a narrow MLP": (shapes(inner=64), [120, 110], 8, [1, 1]),
    "SigLIP": (siglip(), [150, 80], 8, [2, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_counted_is_what_torch_allocates(case: str, dtype: torch.dtype) -> None:
    config, lengths, new_tokens, images = CASES[case]
    real = measured(config, lengths, new_tokens, images, dtype)
    counted = answering(config, lengths, new_tokens, images, dtype)
    assert counted.cache == real["cache"]
    assert counted.logits == real["logits"]
    for phase in ("prefill", "decoding", *(["tower"] if any(images) else [])):
        assert getattr(counted, phase) == pytest.approx(real[phase], rel=0.1), phase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_beside_the_weights(dtype: torch.dtype) -> None:
    """During a run LoRA is not merged: its products, in fp32, are the largest tensors of the prefill."""
    config, lengths, images = shapes(), [300, 200, 90], [2, 1, 1]
    real = measured(config, lengths, 8, images, dtype, lora_r=4)
    counted = answering(config, lengths, 8, images, dtype, training=True)
    assert counted.cache == real["cache"]
    for phase in ("tower", "prefill", "decoding"):
        assert getattr(counted, phase) == pytest.approx(real[phase], rel=0.1), phase
    assert counted.prefill > answering(config, lengths, 8, images, dtype).prefill


def test_as_many_as_fit_and_not_one_more() -> None:
    config, lengths, images = shapes(), sorted([90 + 7 * i for i in range(20)], reverse=True), [1] * 20
    whole = [answering(config, lengths[:n], 16, images[:n], torch.bfloat16).peak for n in range(21)]
    assert whole == sorted(whole) and whole[0] == 0
    for count in (0, 1, 7, 20):
        assert prompts_that_fit(config, lengths, 16, images, torch.bfloat16, whole[count]) == count
    assert prompts_that_fit(config, lengths, 16, images, torch.bfloat16, whole[1] - 1) == 0


def test_a_7b_as_it_was_seen() -> None:
    """32 questions with an image to LLaVA-1.5-7B: half a MB a token in the cache, over 10 GB in all."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
        ),
    )
    counted = answering(config, [650] * 32, 48, [1] * 32, torch.bfloat16, training=True, load_in_4bit=True)
    assert counted.cache == 32 * (650 + 47) * 2 * 32 * 4096 * 2
    assert counted.workspace == 2 * 4096 * 11008
    assert counted.peak > 10 << 30
    fits = prompts_that_fit(config, [650] * 32, 48, [1] * 32, torch.bfloat16, 2 << 30, training=True, load_in_4bit=True)
    assert 1 < fits < 8
    assert math.isclose(
        counted.peak / 32, answering(config, [650], 48, [1], torch.bfloat16, training=True).peak, rel_tol=0.05
    )

"""Configs of the models that are measured or planned; nothing is downloaded, and no weights are made.

Configs of models that presets name are those of the plan (`qllava.models.known`). Each call returns a new config, which
the caller may change.

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_7b())
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from qllava.config import ModelConfig
from qllava.models.shapes import shapes_of

CLIP = "open_clip:ViT-L-14-336-quickgelu/openai"
SIGLIP = "open_clip:ViT-SO400M-14-SigLIP-384/webli"


def llava_7b() -> LlavaConfig:
    """Return LLaVA-1.5 on Vicuna-7B with CLIP-L/336."""
    return shapes_of(ModelConfig("llava-hf/llava-1.5-7b-hf")).config


def llava_13b() -> LlavaConfig:
    """Return LLaVA-1.5 on Vicuna-13B with CLIP-L/336."""
    return _of_parts("lmsys/vicuna-13b-v1.5", CLIP)


def llama31_8b_siglip() -> LlavaConfig:
    """Return Llama-3.1-8B with SigLIP so400m/14 at 384 px."""
    return _of_parts("meta-llama/Llama-3.1-8B-Instruct", SIGLIP)


def llama32_3b_siglip() -> LlavaConfig:
    """Return Llama-3.2-3B, whose head is its embedding table, with SigLIP so400m/14 at 384 px."""
    return _of_parts("meta-llama/Llama-3.2-3B-Instruct", SIGLIP)


def smollm2_siglip() -> LlavaConfig:
    """Return SmolLM2-1.7B, whose head is its embedding table, with SigLIP so400m/14 at 384 px."""
    return _of_parts("HuggingFaceTB/SmolLM2-1.7B-Instruct", SIGLIP)


def cpu_bench() -> LlavaConfig:
    """Return the model of all CPU benchmarks: LLaMA of 8 layers x 1024, and a small tower at LLaVA-1.5's 336 px."""
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=32_000,
        max_position_embeddings=4096,
    )
    vision = _clip(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=336)
    return _llava(text, vision, image_token_index=31_999)


def tiny() -> LlavaConfig:
    """Return a model for tests: 4 layers x 64, images of 28 px in patches of 14 px, which are 4 image tokens."""
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=4096,
    )
    vision = _clip(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=28)
    return _llava(text, vision, image_token_index=511)


def _of_parts(language_model: str, vision_tower: str) -> LlavaConfig:
    return shapes_of(ModelConfig(language_model=language_model, vision_tower=vision_tower)).config


def _clip(**sizes: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(patch_size=14, hidden_act="quick_gelu", **sizes)


def _llava(text: LlamaConfig, vision: Any, *, image_token_index: int) -> LlavaConfig:
    """Return a LLaVA of two configs, without CLIP's class token."""
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_index,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
    )

"""The shapes of models that are measured or planned, as configs alone: nothing is downloaded, no weights are made.

Sizes are those that the models' authors published; only what decides shapes and memory is set. Each function returns
a config of its own, so a caller may change it.

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_7b())
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5 on Vicuna-7B with CLIP-L/336."""
    return _llava_15(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


def llava_13b() -> LlavaConfig:
    """LLaVA-1.5 on Vicuna-13B with CLIP-L/336."""
    return _llava_15(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)


def llama31_8b_siglip() -> LlavaConfig:
    """Llama-3.1-8B with SigLIP so400m/14 at 384 px."""
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256 + 64,
        max_position_embeddings=131_072,
    )
    return _llava(text, _so400m(), image_token_index=128_256)


def llama32_3b_siglip() -> LlavaConfig:
    """Llama-3.2-3B, whose head is its embedding table, with SigLIP so400m/14 at 384 px."""
    text = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128_256 + 64,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    return _llava(text, _so400m(), image_token_index=128_256)


def smollm2_siglip() -> LlavaConfig:
    """SmolLM2-1.7B, whose head is its embedding table, with SigLIP so400m/14 at 384 px."""
    text = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=49_152 + 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return _llava(text, _so400m(), image_token_index=49_152)


def cpu_bench() -> LlavaConfig:
    """The size that benchmarks on a CPU are fixed to: LLaMA of 8 layers x 1024, a small tower at LLaVA-1.5's 336 px."""
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
    """For tests: 4 layers x 64, pictures of 28 px in patches of 14, so 4 image tokens."""
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


def _llava_15(**sizes: int) -> LlavaConfig:
    text = LlamaConfig(vocab_size=32_064, max_position_embeddings=4096, **sizes)
    vision = _clip(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
    )
    return _llava(text, vision, image_token_index=32_000)


def _clip(**sizes: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(patch_size=14, hidden_act="quick_gelu", **sizes)


def _so400m() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )


def _llava(text: LlamaConfig, vision: Any, *, image_token_index: int) -> LlavaConfig:
    """CLIP's class token is dropped ("default"); SigLIP has none ("full")."""
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_index,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if isinstance(vision, CLIPVisionConfig) else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
    )

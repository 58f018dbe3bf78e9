"""Tiny random models, made by plain transformers without a download, in a fraction of a second each.

`make_tiny_llava(folder)` writes what `AutoProcessor` and `LlavaForConditionalGeneration` read back: a CLIP tower of
32 x 32 pixels in patches of 8 (16 image tokens, the class token is dropped), a two-layer LLaMA, and a byte-level BPE
with the ChatML markers. The weights are random but seeded, so two calls give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from qllava.conversation import CHATML
from qllava.image_layout import ImageLayout
from qllava.models.checkpoint import names_on_disk, write_aside, write_settings, write_weights
from qllava.models.weights import EMBEDDING, HEAD

IMAGE_SIZE = 32
PATCH_SIZE = 8
IMAGE_LAYOUT = ImageLayout(4, 4, additional=1, drops_first=True)
IMAGE_TOKENS = IMAGE_LAYOUT.tokens

_CORPUS = [
    "What colour is the circle? red green blue yellow orange purple",
    "How many shapes are there? one two three four five",
    "Describe the picture. There is a large square on the left of a small triangle.",
]


def make_tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of all bytes, ChatML's markers and `<image>`; its end token ends a turn."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
    )


def make_tiny_processor() -> LlavaProcessor:
    """Return the processor of the tiny model: it pads images to a square, and uses 16 image tokens and ChatML."""
    image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.chat_template(),
    )


def make_tiny_model(
    processor: LlavaProcessor, *, seed: int = 0, context: int = 512, layers: int = 2
) -> LlavaForConditionalGeneration:
    """Return a random LLaVA in fp32 that fits the processor; `context` is the maximum length in its config."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=context,
            initializer_range=0.3,  # larger than usual: answers then differ from image to image
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    # fork_rng, because making a model must not change the random state of the test.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.model.multi_modal_projector.parameters():
                parameter.normal_(std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def make_tiny_llava(folder: Path, *, seed: int = 0, context: int = 512) -> Path:
    """Write a complete tiny LLaVA (weights, tokenizer, processor, chat template) to a folder, and return the folder."""
    processor = make_tiny_processor()
    make_tiny_model(processor, seed=seed, context=context).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llava(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model in llava-hf's layout into an empty folder, with the functions that write a merged one."""
    tensors = names_on_disk(model)
    head, embedding = (tensors.get(name) for name in (HEAD, EMBEDDING))
    tied = head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr()
    if tied:
        del tensors[HEAD]
    with write_aside(folder) as aside:
        write_weights(aside, tensors, tensors.__getitem__, max_shard_size=max_shard_size)
        write_settings(aside, model, processor, dtype=model.dtype, tied=tied)


def make_image(colour: str | tuple[int, int, int], size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """Return an image of one colour with a white rectangle in its upper left corner; `size` is (width, height)."""
    image = Image.new("RGB", size, colour)
    image.paste("white", (2, 2, size[0] // 3, size[1] // 3))
    return image


def make_tiny_parts(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write the tiny model's language model and tower as parts of a new LLaVA, and return both folders."""
    processor = make_tiny_processor()
    model = make_tiny_model(processor, seed=seed)
    language_model, tower = folder / "llama", folder / "tower"
    whole = LlamaForCausalLM(model.config.text_config)
    whole.model, whole.lm_head = model.model.language_model, model.lm_head
    whole.save_pretrained(language_model)
    processor.tokenizer.save_pretrained(language_model)
    model.model.vision_tower.save_pretrained(tower)
    processor.image_processor.save_pretrained(tower)
    return language_model, tower


def make_tiny_records(folder: Path, *, rows: int = 8) -> Path:
    """Write images and a LLaVA JSON of conversations about them, and return the path of the file."""
    colours = ("red", "green", "blue", "yellow")
    content = []
    for index in range(rows):
        colour = colours[index % len(colours)]
        make_image(colour, (32 + index, 40)).save(folder / f"{index}.png")
        asked = "<image>\nWhat colour is it?" if index % 2 else "What colour is it?\n<image>"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": colour}]
        if index % 3 == 0:
            turns += [{"from": "human", "value": "How many circles?"}, {"from": "gpt", "value": "one " * (index + 1)}]
        content.append({"id": f"row-{index}", "image": f"{index}.png", "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path

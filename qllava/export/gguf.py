"""Export of a LLaVA as a pair of GGUF files, for llama.cpp and the programs built on it.

    NAME-f16.gguf          the language model, with tokenizer and chat template
    mmproj-NAME-f16.gguf   tower and projector
    Modelfile              for `ollama create`

Tensors are copied from file to file one by one, so the export of a 7B needs no more memory than its largest matrix. A
model that llama.cpp would compute differently is rejected with the reason. The files are written to a temporary folder
that is then renamed, so the output is complete or missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, LlavaConfig, LlavaProcessor

from qllava.config import InputError, expanded
from qllava.export.gguf_tokenizer import adds_bos, read_vocabulary, write_vocabulary
from qllava.export.serving import for_llama_cpp, modelfile, template_of
from qllava.export.tensors import (
    Planned,
    check_nothing_is_lost,
    check_sizes,
    head_size,
    language_tensors,
    projector_tensors,
    tower_tensors,
)
from qllava.image_layout import ImageLayout
from qllava.models.checkpoint import write_aside
from qllava.models.errors import LOAD_ERRORS, one_line
from qllava.models.hub import model_folder
from qllava.models.weights import EMBEDDING, Weights, open_weights
from qllava.runs import Run, folder_of

# Type of the language model's matrices, its name in the header, and the key of the tower's type. The tower stays in 16
# bit, because the few megabytes that 8 bit would save are not worth the loss of precision.
_KINDS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, "f16"),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, "bf16"),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, "f16"),
}
_PLAIN = np.dtype(np.float32)  # dtype of a tensor before it is rounded
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new")  # llama.cpp computes all of them by the tanh formula


@dataclass(frozen=True)
class _Source:
    """Model to export: its folder with the weights, its config and its processor."""

    name: str
    """Name for the output files."""
    folder: Path
    """Folder of the model."""
    config: Any
    """Config of the model, a LlavaConfig."""
    processor: Any
    """Processor of the model, a LlavaProcessor."""
    ends: list[int]
    """Ids that end an answer."""

    @property
    def feature_layer(self) -> int:
        """Number of the tower's blocks before the features."""
        layer: int = self.config.vision_feature_layer
        return layer if layer >= 0 else self.config.vision_config.num_hidden_layers + 1 + layer


def export(model: str, out: Path, *, quantize: str = "f16") -> list[Path]:
    """Write the GGUF pair and the Modelfile of a LLaVA.

    Args:
        model: Folder or hub name of the model.
        out: Folder for the files; it must be empty or missing.
        quantize: Type of the language model's matrices: `f16`, `bf16` or `q8_0`.

    Returns:
        Paths of the language model, of tower and projector, and of the Modelfile.

    Raises:
        InputError: The model is not a complete LLaVA, llama.cpp would compute it differently, `out` is not empty, or
            writing fails; nothing is written then.
    """
    source = _read(model)
    _check(source)
    kind, file_type, beside = _KINDS[quantize]
    kind_beside, file_type_beside, _ = _KINDS[beside]
    names = f"{source.name}-{quantize}.gguf", f"mmproj-{source.name}-{beside}.gguf"
    weights = open_weights(str(source.folder))
    text, vision = source.config.text_config, source.config.vision_config
    check_sizes(weights, text, vision)
    language = language_tensors(weights, text, kind)
    images = tower_tensors(weights, vision, source.feature_layer, kind_beside)
    images += projector_tensors(weights, source.config.projector_hidden_act, kind_beside)
    tied = bool(text.tie_word_embeddings)
    check_nothing_is_lost(weights, language + images, vision, source.feature_layer, tied)
    total = sum(planned.nbytes for planned in language + images)
    with (
        write_aside(out) as aside,
        tqdm(total=total, unit="B", unit_scale=True, desc="Writing GGUF", leave=False) as bar,
    ):
        writer = GGUFWriter(aside / names[0], "llama")
        _language_header(writer, source, file_type, weights)
        _write(writer, language, bar.update)
        writer = GGUFWriter(aside / names[1], "clip")
        _projector_header(writer, source, file_type_beside)
        _write(writer, images, bar.update)
        (aside / "Modelfile").write_text(_modelfile(source, *names), encoding="utf-8")
    return [out / names[0], out / names[1], out / "Modelfile"]


def _read(model: str) -> _Source:
    """Read everything but the weights; raise InputError for a run, and for a model that is not a LLaVA."""
    folder = folder_of(model)
    if Run(folder).kind in ("stage 1", "stage 2"):
        raise InputError(
            f"{folder} is a run, not a complete model; merge it first: qllava merge {shlex.quote(str(folder))} OUT."
        )
    folder = model_folder(str(folder) if folder.is_dir() else model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type != "llava":
            raise InputError(f"{model} is a model of type '{config.model_type}'; expected a LLaVA (type 'llava').")
        processor: Any = LlavaProcessor.from_pretrained(folder, trust_remote_code=False)
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except (*LOAD_ERRORS, TypeError, AttributeError) as error:
        raise InputError(f"{model} cannot be read as a LLaVA: {one_line(error)}") from error
    name = folder.resolve().name if Path(expanded(model)).exists() else model.rpartition("/")[2]
    return _Source(name, folder, config, processor, [ends] if isinstance(ends, int) else list(ends or []))


def _check(source: _Source) -> None:
    """Raise InputError if llama.cpp would compute the model differently."""
    config: LlavaConfig = source.config
    text: Any = config.text_config
    vision: Any = config.vision_config
    rope = text.rope_parameters.get("rope_type", "default")
    layer = config.vision_feature_layer
    wrong = {
        f"its language model is of type '{text.model_type}'; LLaMA and Mistral are supported": (
            text.model_type not in ("llama", "mistral")
        ),
        f"its language model uses the activation '{text.hidden_act}'; silu is supported": text.hidden_act != "silu",
        f"its positions are scaled by '{rope}'; linear and llama3 are supported": (
            rope not in ("default", "linear", "llama3")
        ),
        f"its tower is of type '{vision.model_type}'; only CLIP towers are supported": (
            vision.model_type != "clip_vision_model"
        ),
        f"its tower uses the activation '{vision.hidden_act}'; quick_gelu and gelu are supported": (
            vision.hidden_act not in ("quick_gelu", *_ACTIVATIONS)
        ),
        "its tower's MLP is as wide as the tower itself, so llama.cpp would take the file for an old one": (
            vision.intermediate_size == vision.hidden_size
        ),
        f"its projector uses the activation '{config.projector_hidden_act}'; gelu and linear are supported": (
            config.projector_hidden_act not in ("linear", *_ACTIVATIONS)
        ),
        "its features come from several layers of the tower, or from before the first; one layer is supported": (
            not isinstance(layer, int) or not 1 <= source.feature_layer <= vision.num_hidden_layers
        ),
        "it passes the tower's class token to the language model, while llama.cpp leaves the token out": (
            not ImageLayout.of_config(config).drops_first
        ),
        "it has no chat template, which programs need to build a prompt; add the chat_template.jinja of the training": (
            not source.processor.chat_template
        ),
    }
    for reason, found in wrong.items():
        if found:
            raise InputError(f"{source.folder} cannot be written as GGUF: {reason}.")


def _language_header(writer: GGUFWriter, source: _Source, file_type: int, weights: Weights) -> None:
    """Write config, tokenizer and chat template."""
    text = source.config.text_config
    rows = weights.shape(EMBEDDING)[0]
    size = head_size(text)
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(min(text.max_position_embeddings, getattr(text, "sliding_window", None) or 2**31))
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    rope = text.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    tokenizer = source.processor.tokenizer
    vocabulary = read_vocabulary(tokenizer, rows, source.name)
    write_vocabulary(writer, vocabulary, tokenizer, source.ends, for_llama_cpp(source.processor.chat_template))


def _projector_header(writer: GGUFWriter, source: _Source, file_type: int) -> None:
    """Write the sizes of the tower and the normalization of images."""
    vision, images = source.config.vision_config, source.processor.image_processor
    writer.add_type("mmproj")
    writer.add_name(source.name)
    writer.add_file_type(file_type)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", vision.hidden_act != "quick_gelu")  # false, without silu: quick_gelu
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projection_dim(source.config.text_config.hidden_size)
    writer.add_vision_block_count(source.feature_layer)
    # Without this key llama.cpp skips one more block, in addition to those that the file leaves out.
    writer.add_array("clip.vision.feature_layer", [source.feature_layer])
    writer.add_vision_image_mean(list(images.image_mean))
    writer.add_vision_image_std(list(images.image_std))


def _write(writer: GGUFWriter, plan: list[Planned], done: Callable[[int], Any]) -> None:
    """Write header and tensors; `done` is called with the number of bytes of each tensor."""
    try:
        for planned in plan:
            writer.add_tensor_info(planned.name, planned.shape, _PLAIN, planned.nbytes, planned.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned in plan:
            writer.write_tensor_data(planned.data())
            done(planned.nbytes)
    finally:
        writer.close()


def _modelfile(source: _Source, language_model: str, projector: str) -> str:
    tokenizer, written = source.processor.tokenizer, source.processor.chat_template
    return modelfile(
        language_model,
        projector,
        template_of(written),
        tokenizer.bos_token,
        tokenizer.eos_token or "",
        adds_bos(tokenizer, written),
    )

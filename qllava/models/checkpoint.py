"""Reading and writing a LLaVA in llava-hf's layout, which vLLM, SGLang, llama.cpp and transformers read.

Tensor names are written here and not by `save_pretrained`, because transformers 5 saves a model that was built
from parts under names that other programs do not know. A folder is written under a temporary name and renamed, so it is
complete or does not exist.

    model.vision_tower.X           ->  vision_tower.vision_model.X          (CLIP and SigLIP alike)
    model.multi_modal_projector.X  ->  multi_modal_projector.X
    model.language_model.X         ->  language_model.model.X
    lm_head.X                      ->  language_model.lm_head.X

Files: config.json, generation_config.json, model.safetensors (or shards and their index), processor_config.json,
preprocessor_config.json, chat_template.jinja, tokenizer.json, tokenizer_config.json.

    with write_aside(folder) as aside:
        write_weights(aside, tensors, read, max_shard_size="5GB")
        write_settings(aside, model, processor, dtype=torch.bfloat16, tied=False)
    model, processor = load_llava(folder, dtype=torch.float32)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from qllava.config import InputError, expanded
from qllava.conversation import IMAGE_TOKEN
from qllava.files import whole_folder
from qllava.image_layout import ImageLayout
from qllava.models import agreement
from qllava.models.errors import check_loading, one_line, one_sentence, out_of_memory
from qllava.models.hub import model_folder, settings_folder
from qllava.models.layouts import INDEX, find_weights, refuse_llava_own
from qllava.models.vision import Tower
from qllava.models.weights import llava_name, open_weights
from qllava.runs import Run

_TOKENIZERS_AND_PROCESSORS = (
    ("tokenizer.json", "tokenizer.model"),
    ("preprocessor_config.json", "processor_config.json"),
)
# Sampling settings. Together with `do_sample: false` (as in Vicuna's file) they make a generation config invalid.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def build_processor(tokenizer: Any, tower: Tower, chat_template: str | None = None) -> LlavaProcessor:
    """Build a processor from tokenizer and tower; it writes exactly `tower.layout.tokens` tokens for an image.

    Raises:
        InputError: If the tokenizer does not have `<image>` as one token.
    """
    ids = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != IMAGE_TOKEN:
        # LlavaProcessor would silently use the first piece of the word as image token.
        raise InputError(f"The tokenizer has no token {IMAGE_TOKEN}. Add {IMAGE_TOKEN} as a special token first.")
    return LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.model.config.patch_size,
        vision_feature_select_strategy=tower.layout.strategy,
        num_additional_image_tokens=tower.layout.additional,
        chat_template=chat_template,
    )


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    *,
    max_shard_size: int | str,
) -> None:
    """Write safetensors files, with at most one shard in memory.

    Args:
        folder: Folder for the files.
        tensors: Shapes and types by name, may be on the meta device.
        read: Returns the tensor to write under a name.
        max_shard_size: Maximum size of a file, such as "5GB".

    Raises:
        InputError: If `max_shard_size` cannot be parsed.
    """
    try:
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(
            f"The shard size '{max_shard_size}' cannot be read. Give a number and a unit, such as 5GB."
        ) from error
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: read(key).contiguous() for key in keys})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file with normal file permissions."""
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes the file readable only for its owner, and a server may run as another user.
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_settings(folder: Path, model: Any, processor: LlavaProcessor, *, dtype: torch.dtype, tied: bool) -> None:
    """Write everything but the weights: configs, tokenizer, image processor and chat template.

    `tied` says that the head is the embedding itself and has no weights of its own.
    """
    _save_config(model, folder, dtype, tied)
    _save_generation_config(model, processor.tokenizer, folder)
    _save_processor(processor, folder)


def load_llava(
    folder_or_name: str,
    *,
    dtype: torch.dtype | Literal["auto"],
    quantization_config: Any = None,
    device_map: Any = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA and its processor from a folder or a hub name, in llava-hf's layout or in transformers' own.

    `dtype` is the type of weights that are not quantized; `quantization_config` and `device_map` are passed on.
    The model is in eval mode. A processor that does not specify the number of image tokens (old llava-hf
    files) is completed from the model.

    Raises:
        InputError: If it is not a LLaVA, or files are missing, truncated, or do not fit each other.
    """
    config, processor = load_config(folder_or_name)  # first, because it is fast
    if getattr(config, "quantization_config", None):
        agreement.check_packed(folder_or_name, config, open_weights(folder_or_name))
    loading: dict[str, Any] = {"config": config, "dtype": dtype, "device_map": device_map}
    if quantization_config is not None:  # passing None would drop the checkpoint's own config
        loading["quantization_config"] = quantization_config
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            str(model_folder(folder_or_name)),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **loading,
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"The LLaVA {folder_or_name} cannot be loaded ({one_line(error)}).") from error
    model, report = loaded
    check_loading(report, f"The LLaVA {folder_or_name}")
    return model.eval(), processor


def load_config(folder_or_name: str, *, fetch: bool = True) -> tuple[LlavaConfig, LlavaProcessor]:
    """Load config and processor of a LLaVA, without its weights.

    Args:
        folder_or_name: Folder or hub name of the model.
        fetch: Whether to download the weights of a hub model to check them; weights of a folder are always checked.

    Raises:
        InputError: If files are missing, or parts of the model do not fit each other (`agreement.py`).
    """
    if (folder := Path(expanded(folder_or_name))).is_dir():
        _check_folder(folder)
    config, processor = look_at(folder_or_name)
    if processor is None:
        raise InputError(f"{folder_or_name} has no tokenizer or processor files. Download the model again.")
    if fetch and not folder.is_dir():
        agreement.check_weights(folder_or_name, config, open_weights(folder_or_name))
    return config, processor


def look_at(folder_or_name: str) -> tuple[LlavaConfig, LlavaProcessor | None]:
    """Load the config of a LLaVA, and its processor if it exists, and check that all existing files fit each other.

    Only small files are downloaded from the hub.

    Raises:
        InputError: If it is not a LLaVA, a file cannot be read, or its parts do not fit each other.
    """
    name = folder_or_name
    folder = settings_folder(name)
    files = [path.name for path in folder.iterdir()]
    config = agreement.read_config(folder, name)
    if config.model_type != "llava":
        raise InputError(f"{name} is a model of type '{config.model_type}'; expected a LLaVA (type 'llava').")
    with one_sentence(f"{name}: config.json", "correct it, or copy it from where the weights came from"):
        agreement.check_llava_config(name, config)
    processor: Any = None
    if all(any(file in files for file in either) for either in _TOKENIZERS_AND_PROCESSORS):
        try:
            processor = LlavaProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"The processor of {name} cannot be loaded ({one_line(error)}).") from error
        agreement.check_tokenizer(name, config, processor.tokenizer)
        agreement.check_processor(name, config, processor)
        _settle_image_tokens(processor, config, name)
    agreement.read_generation(folder, name, config.text_config)
    if Path(expanded(name)).is_dir() and find_weights(files, name):
        agreement.check_weights(name, config, open_weights(name))
    return config, processor


@contextmanager
def write_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` at the end; remove it after an error.

    Raises:
        InputError: If `folder` is not empty, or writing fails.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty. Choose another folder, or remove it first.")
    try:
        with whole_folder(folder) as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} could not be written ({one_line(error)}); incomplete files were removed. "
            "Free disk space or choose another folder."
        ) from error


def names_on_disk(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the model's tensors by their names on disk, including a head that is tied to the embedding.

    Raises:
        ValueError: If the model is quantized or wrapped.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        on_disk = llava_name(name)
        if not name.startswith(("model.", "lm_head.")) or not tensor.is_floating_point() or "lora_" in name:
            raise ValueError(f"{name} ({tensor.dtype}) is not a weight of a LLaVA in full precision; merge it first")
        tensors[on_disk] = tensor.detach()
    return tensors


def _save_config(model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype, tied: bool) -> None:
    """Write config.json with the keys of both transformers 4 and 5."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.image_seq_length = ImageLayout.of_config(config).tokens
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["torch_dtype"] = written["dtype"]
    for part in (written, written["text_config"], written["vision_config"]):
        part.pop("_name_or_path", None)  # a local path
    text = written["text_config"]
    rope = text.get("rope_parameters")
    if rope:
        # Without rope_theta, transformers 4 silently uses 10000, which is wrong for every LLaMA 3.
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    _write_json(folder / "config.json", written)


def _save_generation_config(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Write a generation_config.json that every version accepts; missing special tokens come from the tokenizer."""
    generation: Any = copy.deepcopy(model.generation_config)
    if not generation.do_sample:
        for name in _SAMPLING:
            setattr(generation, name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name))
    generation.save_pretrained(folder)


def _save_processor(processor: LlavaProcessor, folder: Path) -> None:
    """Write tokenizer, image processor and chat template so that transformers 4 and 5 read the same."""
    processor.save_pretrained(folder)
    # transformers 5 puts the image processor into processor_config.json; older readers want it in its own file.
    processor.image_processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written.pop("image_processor", None)
    _write_json(path, written)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if written.get("tokenizer_class") == "TokenizersBackend":  # the same class; transformers 4 knows the old name only
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(written.get("extra_special_tokens"), list):  # a list under this name is refused by transformers 4
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    _write_json(path, written)


def _check_folder(folder: Path) -> None:
    """Raise InputError early if a folder is not a complete LLaVA."""
    refuse_llava_own(str(folder), [path.name for path in folder.iterdir()], folder)
    if not (folder / "config.json").is_file():
        hint = "it is an adapter: merge it first" if Run(folder).has_adapter else "no config.json"
        raise InputError(f"{folder} is not a LLaVA ({hint}). Give a merged model or a model in llava-hf's layout.")
    for either in _TOKENIZERS_AND_PROCESSORS:
        if not any((folder / name).is_file() for name in either):
            raise InputError(f"{folder} has no {' or '.join(either)}. Copy or download the model again.")
    open_weights(str(folder))  # reads the headers and compares them with the files' lengths


def _settle_image_tokens(processor: LlavaProcessor, config: LlavaConfig, source: str) -> None:
    """Make the processor write as many image tokens as the model has features; raise InputError if it cannot."""
    vision: Any = config.vision_config
    layout = ImageLayout.of_config(config)
    if processor.patch_size is None or processor.vision_feature_select_strategy is None:
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = layout.additional
    written = ImageLayout.of_processor(processor, vision.image_size, vision.image_size)
    if written.tokens != layout.tokens:
        raise InputError(
            f"The processor of {source} writes {written.tokens} image tokens for an image and the model has "
            f"{layout.tokens} features. Correct patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens in its processor_config.json."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does: indented, keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

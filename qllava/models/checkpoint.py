"""A whole LLaVA on disk: the layout of llava-hf's checkpoints, which vLLM, SGLang, llama.cpp and transformers read.

Chosen: the names are written here and not by `save_pretrained`, because transformers 5 saves a model that was built
from parts under names of its own, which other programs do not know. A folder is written aside and renamed, so it is
whole or not there.

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
# Settings of sampling. Beside `do_sample: false` (as Vicuna's file has them) they make a generation config invalid.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def build_processor(tokenizer: Any, tower: Tower, chat_template: str | None = None) -> LlavaProcessor:
    """Join tokenizer and tower to a processor that writes exactly `tower.layout.tokens` tokens for an image.

    Raises InputError when `<image>` is not one token of the tokenizer: it has to be added before.
    """
    ids = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != IMAGE_TOKEN:
        # LlavaProcessor would take the first piece of the word for the image token and say nothing.
        raise InputError(f"The tokenizer has no token {IMAGE_TOKEN}; add it as a special token first.")
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
    """Write safetensors, in shards where they are many; no more than one shard is in memory.

    tensors: shapes and types by name; they may be on the meta device.
    read: gives what is written under a name.

    Raises InputError when the size is not understood.
    """
    try:
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    except ValueError as error:
        raise InputError(
            f"The shard size '{max_shard_size}' is not understood; write a number and a unit, such as 5GB."
        ) from error
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: read(key).contiguous() for key in keys})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file, which every user may read who may read its folder."""
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes it the owner's alone, and a server may be another user.
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_settings(folder: Path, model: Any, processor: LlavaProcessor, *, dtype: torch.dtype, tied: bool) -> None:
    """Write everything but the weights: configs, tokenizer, image processor and chat template.

    tied: the head is the embedding itself, and is not among the weights.
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

    `dtype` is that of the weights that are not quantized; `quantization_config` and `device_map` are transformers' own.
    The model comes in eval mode. A processor that does not say how many image tokens an image takes (old llava-hf
    files) is completed from the model.

    Raises InputError when it is not a LLaVA, or files are missing, cut off, or do not belong together.
    """
    config, processor = load_config(folder_or_name)  # first: it is quick, the weights are not
    if getattr(config, "quantization_config", None):
        agreement.check_packed(folder_or_name, config, open_weights(folder_or_name))
    loading: dict[str, Any] = {"config": config, "dtype": dtype, "device_map": device_map}
    if quantization_config is not None:  # handing in None would drop the one that the checkpoint brings
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
    """What `load_llava` loads but for the weights: config and processor.

    Args:
        folder_or_name: The model.
        fetch: Whether the weights of a model on the hub are fetched, to be compared; those of a folder always are.

    Raises:
        InputError: Something is missing, or parts of the model do not agree (`agreement.py`), its weights included.
    """
    if (folder := Path(expanded(folder_or_name))).is_dir():
        _check_folder(folder)
    config, processor = look_at(folder_or_name)
    if processor is None:
        raise InputError(f"{folder_or_name} lacks its tokenizer or processor files; download the model again.")
    if fetch and not folder.is_dir():
        agreement.check_weights(folder_or_name, config, open_weights(folder_or_name))
    return config, processor


def look_at(folder_or_name: str) -> tuple[LlavaConfig, LlavaProcessor | None]:
    """The config of a LLaVA, and its processor where one is there; whatever else is there is compared with them.

    Nothing is fetched from the hub but small files.

    Raises:
        InputError: It is not a LLaVA, a file cannot be read, or parts of it do not agree.
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
    """Yield a new folder beside `folder` and rename it to `folder` at the end; after any error nothing is left of it.

    Raises InputError when `folder` holds something, or when writing fails.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder or remove it first.")
    try:
        with whole_folder(folder) as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} could not be written ({one_line(error)}) and nothing was left there; "
            "make room or choose another place."
        ) from error


def names_on_disk(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's tensors under their names on disk; a head that is the embedding is among them.

    Raises ValueError for a model that is quantized or wrapped.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        on_disk = llava_name(name)
        if not name.startswith(("model.", "lm_head.")) or not tensor.is_floating_point() or "lora_" in name:
            raise ValueError(f"{name} ({tensor.dtype}) is not a weight of a LLaVA in full precision; merge it first")
        tensors[on_disk] = tensor.detach()
    return tensors


def _save_config(model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype, tied: bool) -> None:
    """Write config.json, with the spellings of transformers 4 beside those of 5 where they differ."""
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
        part.pop("_name_or_path", None)  # a folder of this machine
    text = written["text_config"]
    rope = text.get("rope_parameters")
    if rope:
        # Without rope_theta, transformers 4 takes 10000: wrong for every LLaMA 3, and silently.
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    _write_json(folder / "config.json", written)


def _save_generation_config(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Write a generation_config.json that every version accepts; special tokens it lacks come from the tokenizer."""
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
    """Find what is wrong with a folder before transformers spends minutes on it."""
    refuse_llava_own(str(folder), [path.name for path in folder.iterdir()], folder)
    if not (folder / "config.json").is_file():
        hint = "it holds an adapter: merge it first" if Run(folder).has_adapter else "no config.json"
        raise InputError(f"{folder} is not a LLaVA ({hint}); expected a folder that `qllava merge` or llava-hf wrote.")
    for either in _TOKENIZERS_AND_PROCESSORS:
        if not any((folder / name).is_file() for name in either):
            raise InputError(f"{folder} lacks {' or '.join(either)}; copy or download the model again.")
    open_weights(str(folder))  # reads the headers and compares them with the files' lengths


def _settle_image_tokens(processor: LlavaProcessor, config: LlavaConfig, source: str) -> None:
    """Make sure that the processor writes as many image tokens as the model has features, or say what is wrong."""
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
            f"{layout.tokens} features; correct patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens in its processor_config.json."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does: indented, keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

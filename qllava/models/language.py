"""The language model of a LLaVA before its weights: its folder, its config and its tokenizer with `<image>`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qllava.config import NANO_WEIGHTS, InputError, expanded
from qllava.conversation import IMAGE_TOKEN
from qllava.models import agreement
from qllava.models.errors import one_line, one_sentence
from qllava.models.hub import settings_folder
from qllava.models.layouts import find_weights
from qllava.models.weights import language_model_name, open_weights

LANGUAGE_MODELS = {"llama": "LLaMA 1-3, Vicuna, SmolLM2, TinyLlama", "mistral": "Mistral"}


def nano_part(name: str, part: str) -> str:
    """Return the folder of a part of nano, or the name unchanged."""
    if name != "nano":
        return name
    folder = NANO_WEIGHTS / part
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"nano's weights are missing ({folder}). Install qllava again, or build them with recipes/build_nano.py."
        )
    return str(folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model, and add `<image>` and a padding token.

    Raises:
        InputError: If the tokenizer cannot be read.
    """
    folder = settings_folder(name)
    try:
        # legacy: LLaMA 1, 2 and Vicuna were trained with it; tokenizers with a tokenizer.json ignore it.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, legacy=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"The tokenizer of {name} cannot be loaded ({one_line(error)}). Download it again.") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def language_model_config(name: str, *, whole: bool = True) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Load config and tokenizer of a LLaMA-family model, and check that all existing files fit each other.

    Args:
        name: A folder or a hub name.
        whole: Whether a tokenizer is required; otherwise a missing tokenizer is returned as None.

    Raises:
        InputError: If the model is of another type, or its parts do not fit each other.
    """
    folder = settings_folder(name)
    config = agreement.read_config(folder, f"The language model {name}")
    if config.model_type not in LANGUAGE_MODELS:
        supported = "; ".join(f"{kind} ({names})" for kind, names in LANGUAGE_MODELS.items())
        raise InputError(f"The language model {name} is of type '{config.model_type}'. Supported types: {supported}.")
    with one_sentence(f"{name}: config.json", "correct it, or copy it from where the weights came from"):
        agreement.check_text_config(name, config)
    files = [path.name for path in folder.iterdir()]
    tokenizer = None
    if whole or any(file in files for file in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(name)
        agreement.check_language_model(name, config, tokenizer)
    agreement.read_generation(folder, name, config)
    if Path(expanded(name)).is_dir() and find_weights(files, name):
        agreement.check_table(name, config, open_weights(name, language_model_name))
    return config, tokenizer


def grown(rows: int, tokens: int) -> int:
    """Return the number of embedding rows for `tokens` tokens: `rows` if they suffice, else a multiple of 64."""
    return rows if tokens <= rows else -(-tokens // 64) * 64

"""Computing a LLaVA layer by layer, with one layer in memory, however large the model is.

Every probe goes through a layer before the next layer is read. Two models are computed in this way and compared: a
folder as any program would load it (`Stored`), and a base with its adapter as it was trained (`Adapted`), which
consists of bitsandbytes' and peft's own layers and does not use the code that adds a delta to a weight.

S tokens, D width, I images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import inject_adapter_in_model
from torch import Tensor, nn
from tqdm import tqdm

from qllava.image_layout import ImageLayout
from qllava.models.delta import Delta
from qllava.models.nf4 import KIND
from qllava.models.weights import EMBEDDING, HEAD

LAYERS = "language_model.model.layers"
TOWER = "vision_tower.vision_model"


class Source(Protocol):
    """Source of the weights of modules."""

    dtype: torch.dtype
    """Type of the computation."""
    device: torch.device
    """Device of the computation."""

    def filled(self, name: str, empty: nn.Module) -> Any:
        """Return a copy of a module on the meta device, filled with the weights of this name on disk."""


class Stored:
    """Weights of a folder, unchanged."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device

    def filled(self, name: str, empty: nn.Module) -> Any:
        """Return the module with its weights, see `Source`."""
        module = copy.deepcopy(empty)
        state = {key: self._read(f"{name}.{key}") for key in module.state_dict()}
        module.load_state_dict({key: tensor.to(self.device, self.dtype) for key, tensor in state.items()}, assign=True)
        _count_positions(module, self.device)
        return module.eval().requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        return self.weights[EMBEDDING if name == HEAD and HEAD not in self.weights else name]


class Adapted(Stored):
    """A base with its adapter as in training: 4-bit layers with separate LoRA."""

    def __init__(
        self, base: Mapping[str, Tensor], delta: Delta, dtype: torch.dtype, device: torch.device, *, four_bit: bool
    ) -> None:
        super().__init__(base, dtype, device)
        self.delta, self.four_bit = delta, four_bit

    def filled(self, name: str, empty: nn.Module) -> Any:
        """Return the module with its weights, see `Source`."""
        if not name.startswith(f"{LAYERS}."):
            return super().filled(name, empty)
        layer: Any = copy.deepcopy(empty)
        linear = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for path in linear if self.four_bit else []:
            layer.set_submodule(path, self._packed(f"{name}.{path}", layer.get_submodule(path)))
        packed = set(linear) if self.four_bit else set()
        for key in dict(layer.named_parameters()):
            path, _, own = key.rpartition(".")
            if path not in packed:
                tensor = self._read(f"{name}.{key}").to(self.device, self.dtype)
                setattr(layer.get_submodule(path), own, nn.Parameter(tensor, requires_grad=False))
        return self._with_lora(layer, name)

    def _read(self, name: str) -> Tensor:
        return self.delta[name] if name in self.delta.replaced else super()._read(name)

    def _packed(self, name: str, empty: Any) -> Linear4bit:
        """Return a layer in NF4 with double quantization, as in training."""
        biased = empty.bias is not None
        layer: Any = Linear4bit(
            empty.in_features, empty.out_features, bias=biased, compute_dtype=self.dtype, device="meta", **KIND
        )
        weight: Any = Params4bit(self._read(f"{name}.weight"), requires_grad=False, **KIND)
        layer.weight = weight.to(self.device)  # packs it
        if biased:
            layer.bias = nn.Parameter(self._read(f"{name}.bias").to(self.device, self.dtype), requires_grad=False)
        layer.support_avx512bf16_for_cpu = False  # see `assemble.prepare_for_training`
        return layer  # type: ignore[no-any-return]

    def _with_lora(self, layer: Any, name: str) -> Any:
        """Add peft's LoRA layers to the layers that were trained."""
        trained = [path.removeprefix(f"{name}.") for path in self.delta.layers if path.startswith(f"{name}.")]
        if not trained:
            return layer.eval()
        layer.is_loaded_in_4bit = self.four_bit
        inject_adapter_in_model(self.delta.lora.peft_config(trained, projector=False), layer)
        for path in trained:
            wrapped = layer.get_submodule(path)
            for own, tensor in zip(("lora_A", "lora_B"), self.delta.factors(f"{name}.{path}"), strict=True):
                getattr(wrapped, own)["default"].weight = nn.Parameter(tensor.to(self.device), requires_grad=False)
        return layer.eval()


def _count_positions(module: nn.Module, device: torch.device) -> None:
    """Fill the buffers, which are the position numbers of a tower's patches."""
    for path, buffer in list(module.named_buffers()):
        if buffer.device.type == "meta":
            owner, _, own = path.rpartition(".")
            if own != "position_ids":
                raise ValueError(f"{path} is neither a weight nor a known buffer")
            module.get_submodule(owner).register_buffer(
                own, torch.arange(buffer.shape[-1], device=device)[None], persistent=False
            )


@torch.no_grad()
def hidden_states(model: Any, source: Source, probes: Sequence[Mapping[str, Tensor]], title: str) -> list[Tensor]:
    """Return the hidden states before the head at positions that predict a learned token, (positions, D) per probe.

    Args:
        model: A LlavaForConditionalGeneration on the meta device.
        source: Source of its weights.
        probes: input_ids (S), labels (S), and with images pixel_values (I, 3, H, W).
        title: Title of the progress bar.
    """
    language_model = model.model.language_model
    hidden = _embedded(model, source, probes)
    rotary = type(language_model.rotary_emb)(language_model.config).to(source.device)
    angles = [
        rotary(states, position_ids=torch.arange(states.shape[1], device=source.device)[None]) for states in hidden
    ]
    for number, empty in enumerate(tqdm(language_model.layers, desc=title, unit="layer", leave=False)):
        layer = source.filled(f"{LAYERS}.{number}", empty)
        for which, (states, angle) in enumerate(zip(hidden, angles, strict=True)):
            # Without a mask: every probe is one sequence, and attention is causal.
            out = layer(states, attention_mask=None, position_embeddings=angle)
            hidden[which] = out[0] if isinstance(out, tuple) else out
        del layer
    norm = source.filled("language_model.model.norm", language_model.norm)
    return [
        norm(states)[0, :-1][(probe["labels"][1:] != -100).to(source.device)]
        for states, probe in zip(hidden, probes, strict=True)
    ]


def _embedded(model: Any, source: Source, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the embeddings of each probe, (1, S, D), with image features at the image tokens."""
    table = source.filled("language_model.model.embed_tokens", model.model.language_model.embed_tokens)
    hidden = [table(probe["input_ids"].to(source.device))[None] for probe in probes]
    del table
    config = model.config
    imaged = [number for number, probe in enumerate(probes) if "pixel_values" in probe]
    pixels = [probes[number]["pixel_values"].to(source.device, source.dtype) for number in imaged]
    if not imaged:
        return hidden
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    features = features_at(
        tower, pixels, config.vision_feature_layer, lambda name, part: source.filled(f"{TOWER}.{name}", part)
    )
    projector = source.filled("multi_modal_projector", model.model.multi_modal_projector)
    for number, seen in zip(imaged, features, strict=True):
        seen = seen[:, ImageLayout.of_config(config).first :]
        places = (probes[number]["input_ids"] == config.image_token_index).to(source.device)
        hidden[number][0, places] = projector(seen).flatten(0, 1).to(source.dtype)
    return hidden


def features_at(
    tower: Any,
    pixels: Sequence[Tensor],
    layer: int,
    filled: Callable[[str, nn.Module], Any] = lambda name, part: part,
) -> list[Tensor]:
    """Return the hidden states of a CLIP or SigLIP tower at one layer, (I, 3, H, W) each -> (I, tokens, D) each.

    Args:
        tower: The vision tower.
        pixels: Images of each probe.
        layer: Index of the hidden states; -1 for those after the last layer. Later layers are not computed.
        filled: Returns a part of the tower, given by name, with its weights.
    """
    embeddings = filled("embeddings", tower.embeddings)
    dtype = embeddings.patch_embedding.weight.dtype
    hidden = [embeddings(image.to(dtype)) for image in pixels]
    if hasattr(tower, "pre_layrnorm"):  # CLIP's, in transformers' spelling; SigLIP has none
        norm = filled("pre_layrnorm", tower.pre_layrnorm)
        hidden = [norm(states) for states in hidden]
    layers = tower.encoder.layers
    for number, empty in enumerate(layers[: layer if layer >= 0 else len(layers) + 1 + layer]):
        module = filled(f"encoder.layers.{number}", empty)
        hidden = [module(states, None) for states in hidden]
    return hidden

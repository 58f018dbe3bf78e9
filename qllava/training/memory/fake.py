"""The real training step on fake tensors, and a tracker of the memory that it holds.

Fake tensors have sizes and no bytes. The modules are the real ones (transformers', peft's, bitsandbytes' 4-bit layers),
and so are the forward pass of a pack (`training.step.exact`), autograd, activation checkpointing and AdamW. A `Tracker`
sees every operation, knows which storages are alive, and records the peak. It counts real tensors as well.

The fake tensors are on the CPU: with fake CUDA tensors torch's backward pass does not run without a GPU.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig, LlavaForConditionalGeneration

from qllava.data.collate import pack_tensors
from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import Pack, lay_out
from qllava.image_layout import ImageLayout
from qllava.models.adapter import add_lora, train_projector_only
from qllava.models.assemble import Assembled
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training.step.attention import looking_at

Parts = Counter[str]
_MOMENTS = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
"""Values that an optimizer stores for each trained value, if not AdamW's two; by the start of its name. SGD is
transformers', without momentum."""


def fake_llava(config: LlavaConfig, *, load_in_4bit: bool, dtype: torch.dtype, lora: Lora | None) -> Any:
    """Return a LLaVA prepared for training, of fake CPU tensors; to be called inside a `FakeTensorMode`.

    Linear layers of the language model are bitsandbytes' Linear4bit with packed weights and double quantization;
    projector and LoRA are fp32, everything else is in `dtype`.

    Returns:
        A PeftModel, or without `lora` (stage 1, which trains only the projector) a LlavaForConditionalGeneration.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(copy.deepcopy(config))
        model.to(dtype)
        if load_in_4bit:
            _quantize(model, dtype)
        model.model.multi_modal_projector.float()
        model.requires_grad_(False)
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        recipe = Recipe("", None, None, "mlp2x_gelu", -2, "pad", "", load_in_4bit)
        assembled = Assembled(model, None, recipe)  # type: ignore[arg-type]  # there is nothing to read
        with warnings.catch_warnings():  # peft reads an attribute that transformers has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = add_lora(assembled, lora) if lora else train_projector_only(assembled)
    _make_fake(adapted, dtype)
    return adapted


def _quantize(model: Any, dtype: torch.dtype) -> None:
    for layer in model.model.language_model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                bias = linear.bias is not None
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, dtype, quant_type="nf4")
                layer.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # required by peft's LoRA for 4-bit layers


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace tensors on "meta" by fake CPU tensors; shared tensors stay shared."""
    made: dict[int, Any] = {}
    module: Any
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                packed = isinstance(old, bnb.nn.Params4bit)
                shape = ((old.numel() + 1) // 2, 1) if packed else old.shape
                new = torch.empty(shape, dtype=torch.uint8 if packed else old.dtype)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                if packed:
                    # A Params4bit cannot hold a fake tensor; a parameter with its state works the same way.
                    made[id(old)].quant_state = module.quant_state = _packed_state(old.shape, dtype)
            module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _packed_state(shape: torch.Size, dtype: torch.dtype) -> QuantState:
    """Return the state of NF4 in blocks of 64, whose scales are 8 bit in blocks of 256."""
    blocks = -(-shape.numel() // 64)
    scales = torch.empty(-(-blocks // 256))
    outer = QuantState(scales, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return QuantState(absmax, shape, torch.empty(16), 64, "nf4", dtype, torch.empty(()), outer)


class Tracker(TorchDispatchMode):
    """Counter of the storages that are alive, by part, and of the peak in each phase; for fake or real tensors.

    Args:
        vocabulary: A tensor of this width counts as logits.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.phase = ""
        self.live: Parts = Counter()
        self.peaks: dict[str, Parts] = {}
        self._storages: dict[int, tuple[int, str, Any]] = {}

    def put(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under this part, whether it was known or not."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            size, before, reference = self._storages[key]
            self.live[before] -= size
        else:
            size, reference = storage.nbytes(), weakref.ref(storage, lambda _: self._freed(key))
        self._storages[key] = (size, part, reference)
        self.live[part] += size

    def part(self, tensor: Tensor) -> str:
        """Return the part under which a known tensor is counted."""
        return self._storages[id(tensor.untyped_storage())][1]

    def _freed(self, key: int) -> None:
        size, part, _ = self._storages.pop(key)
        self.live[part] -= size

    def _note(self) -> None:
        if self.phase not in self.peaks or self.live.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = Counter(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it allocated."""
        if func is torch.ops.prim.device.default:  # three of four calls: asks for the device and allocates nothing
            return func(*args)
        name, inside = func.name(), 0
        if name.startswith("bitsandbytes::gemm_4bit"):
            inside = math.prod(args[2]) * args[0].element_size()
        self.live["workspace"] += inside
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._storages:
                own = name.startswith("bitsandbytes::dequantize")
                logits = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary
                self.put(tensor, "workspace" if own else "logits" if logits else "activations")
        self._note()
        self.live["workspace"] -= inside
        return out


def track_model(tracker: Tracker, model: Any) -> None:
    """Count a model's tensors by part, and derive the phases from its decoder layers.

    Phases: "images", "forward" (with the head, forward and backward), "kept" and "recomputed" (backward pass through
    layers of each kind), "projector" (the rest of the backward pass).
    """
    for name, parameter in model.named_parameters():
        part = "LoRA" if "lora_" in name else "projector" if "multi_modal_projector" in name else "weights"
        tracker.put(parameter, part)
        state = getattr(parameter, "quant_state", None)
        for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ():
            tracker.put(tensor, part)
    for buffer in model.buffers():
        tracker.put(buffer, "weights")

    def enter(phase: str) -> Callable[[Tensor], None]:
        return lambda gradient: setattr(tracker, "phase", phase)

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if tracker.phase == "images":  # but not when the layer is recomputed
            tracker.phase = "forward"
            if args[0].requires_grad:
                args[0].register_hook(enter("projector"))

    def end(module: Any, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(enter("recomputed" if module.gradient_checkpointing else "kept"))

    layers = llava_of(model).model.language_model.layers
    layers[0].register_forward_pre_hook(begin)
    for layer in layers:
        layer.register_forward_hook(end)


def llava_of(model: Any) -> Any:
    """Return the LlavaForConditionalGeneration inside a PeftModel, or the model itself."""
    return model.base_model.model if hasattr(model, "peft_config") else model


def step_of_pack(model: Any, tracker: Tracker, pack: dict[str, Any], dtype: torch.dtype) -> None:
    """Run the second pack of an optimizer step and the step: gradients and AdamW's state are there from a first one.

    Args:
        model: The model in training mode, known to the tracker.
        tracker: Records the peak of each phase.
        pack: The model's inputs, pixels included.
        dtype: Type of autocast; fp32 for none.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, fused=True)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
        tracker.put(parameter.grad, tracker.part(parameter))
    optimizer.step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tracker.put(tensor, "optimizer")
    tracker.peaks.clear()
    tracker.phase = "images"
    with looking_at(llava_of(model).model.language_model):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32), _autocast_of_the_cpu():
            log_probs = model(**pack).log_probs
        loss = -log_probs.sum() / len(log_probs)
        del log_probs
        loss.backward()
    tracker.phase = "step"
    optimizer.step()


def loss_of_pack(model: Any, tracker: Tracker, pack: dict[str, Any], dtype: torch.dtype) -> int:
    """Return the bytes that the loss of a held-out pack takes in addition to the model, without a backward pass.

    Args:
        model: The model in evaluation mode, known to the tracker.
        tracker: Its peaks are discarded.
        pack: The model's inputs, pixels included.
        dtype: Type of autocast; fp32 for none.
    """
    tracker.peaks.clear()
    tracker.phase = "held out"
    held = tracker.live.total() - tracker.live["activations"]
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with looking_at(llava_of(model).model.language_model), torch.no_grad(), autocast, _autocast_of_the_cpu():
        model(**pack)
    return tracker.peaks["held out"].total() - held


@contextmanager
def _autocast_of_the_cpu() -> Iterator[None]:
    """Answer for the CPU when peft asks, without naming a device, whether autocast is on; torch answers for CUDA."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": asked(device)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def held_by(optim: str, shapes: Iterable[Sequence[int]]) -> int:
    """Return the bytes that an optimizer's state takes on the GPU.

    bitsandbytes keeps tensors of fewer than 4,096 values in 32 bit, 8-bit scales in blocks of 256, and pages tensors of
    100,000 values or more. Adafactor keeps the sums of a matrix's rows and columns.

    Args:
        optim: One of TRL's names; an optimizer whose state is not known here counts as AdamW.
        shapes: Shapes of the trained tensors.
    """
    kind = optim.removeprefix("paged_").partition("_")[0]
    if kind == "adafactor":
        return sum(4 * _factored(shape) for shape in shapes)
    moments, total = _MOMENTS.get(kind, 2), 0
    for size in map(math.prod, shapes):
        small = "8bit" not in optim or size < 4096
        values, scales = (4 * moments * size, 0) if small else (moments * size, 4 * moments * -(-size // 256))
        total += scales + (0 if "paged" in optim and size >= 100_000 else values)
    return total


def _factored(shape: Sequence[int]) -> int:
    """Return the number of values that Adafactor stores for a tensor."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def example_pack(config: LlavaConfig, tokens: int, *, learned: float, samples_per_image: int) -> Pack:
    """Return a pack of `tokens` tokens, of which a share of about `learned` is learned; the others belong to images.

    Every image is shared by `samples_per_image` samples if there is room. A pack has room for at least one image and a
    few words: a shorter one is lengthened.
    """
    image, each = config.image_token_index, ImageLayout.of_config(config).tokens
    tokens = max(tokens, each + 4)
    samples_per_image = min(samples_per_image, (tokens - each - 1) // 3)
    most = tokens // (each + 1 + 3 * samples_per_image)
    images = min(max(1, int((1 - learned) * tokens / each)), most)
    own = np.diff(np.linspace(0, tokens - images * (each + 1), images * samples_per_image + 1).astype(int))
    begin, next_line, *words = (id for id in range(1, 12) if id != image)
    shared = [begin, *[image] * each]
    samples = []
    for number, length in enumerate(own):
        text = [next_line] + [words[number % 8]] * (int(length) - 1)
        labels = [IGNORE_INDEX] * (len(shared) + 1) + text[1:]
        file = str(number // samples_per_image)
        ids = {"id": str(number), "input_ids": shared + text, "labels": labels}
        samples.append({**ids, "image_files": [file], "image_tokens": [each]})
    return lay_out(samples, image)


def tensors_of(config: LlavaConfig, pack: Pack) -> dict[str, Any]:
    """Return a pack as the model's inputs, with empty pixels; to be called outside a FakeTensorMode."""
    vision: Any = config.vision_config
    side = vision.image_size
    return {**pack_tensors(pack), "pixel_values": torch.zeros(len(pack.images), 3, side, side)}

"""The real training step on fake tensors, and who counts what it holds.

Fake tensors have sizes and no bytes. The modules are the real ones (transformers', peft's, bitsandbytes' 4-bit layers),
and so are `training.exact`'s forward pass of a pack, autograd, recomputation and AdamW. A `Tracker` sees every
operation, knows which storages live, and notes the most that lived at one time. It counts real tensors as well.

Tensors are fake ones of the CPU: on fake ones of CUDA torch's backward pass does not run without a GPU.
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
"""Values that an optimizer keeps of each value that is trained, where they are not AdamW's two; by the start of its
name. SGD is transformers', without momentum."""


def fake_llava(config: LlavaConfig, *, load_in_4bit: bool, dtype: torch.dtype, lora: Lora | None) -> Any:
    """A LLaVA as it is trained, of fake CPU tensors; to be called inside a `FakeTensorMode`.

    Linear layers of the language model are bitsandbytes' Linear4bit with packed weights, doubly quantized; projector
    and LoRA are fp32, everything else is in `dtype`. Returns a PeftModel, or without `lora` (stage 1, the projector
    alone) a LlavaForConditionalGeneration.
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
        with warnings.catch_warnings():  # peft asks the model by a name that transformers is giving up
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
    model.is_loaded_in_4bit = True  # peft's LoRA for 4-bit layers asks for it


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Put fake tensors of the CPU in the place of those on "meta"; what was shared stays shared."""
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
                    # A Params4bit cannot be made of a fake tensor; a parameter with its state is used in the same way.
                    made[id(old)].quant_state = module.quant_state = _packed_state(old.shape, dtype)
            module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _packed_state(shape: torch.Size, dtype: torch.dtype) -> QuantState:
    """NF4 in blocks of 64 whose scales are 8 bit, in blocks of 256."""
    blocks = -(-shape.numel() // 64)
    scales = torch.empty(-(-blocks // 256))
    outer = QuantState(scales, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return QuantState(absmax, shape, torch.empty(16), 64, "nf4", dtype, torch.empty(()), outer)


class Tracker(TorchDispatchMode):
    """Knows which storages live, by part, and the most that lived at one time in each phase. Fake or real tensors.

    vocabulary: a tensor of this width is counted as logits.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.phase = ""
        self.live: Parts = Counter()
        self.peaks: dict[str, Parts] = {}
        self._storages: dict[int, tuple[int, str, Any]] = {}

    def put(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as of this part, whether it was known or not."""
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
        """What a tensor that is known counts as."""
        return self._storages[id(tensor.untyped_storage())][1]

    def _freed(self, key: int) -> None:
        size, part, _ = self._storages.pop(key)
        self.live[part] -= size

    def _note(self) -> None:
        if self.phase not in self.peaks or self.live.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = Counter(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        if func is torch.ops.prim.device.default:  # three of four: where a tensor is, which makes nothing
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
    """Count a model's tensors by part, and tell phases by its decoder layers.

    Phases: "images", "forward" (with the head, there and back), "kept" and "recomputed" (the way back through layers
    of each kind), "projector" (the rest of it).
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
        if tracker.phase == "images":  # and not when the layer is recomputed
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
    """The LlavaForConditionalGeneration inside a PeftModel, or the model itself."""
    return model.base_model.model if hasattr(model, "peft_config") else model


def step_of_pack(model: Any, tracker: Tracker, pack: dict[str, Any], dtype: torch.dtype) -> None:
    """The second pack of an optimizer's step, when gradients of a first and AdamW's state are there, and the step.

    model: in training, and known to the tracker. pack: what the model takes, pixels included. dtype: of autocast; fp32
    for none.
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
    """Return the bytes that the loss of a held-out pack takes beside the model: nothing is kept for a way back.

    Args:
        model: In evaluation, and known to the tracker.
        tracker: Its figures of phases are thrown away.
        pack: What the model takes, pixels included.
        dtype: Of autocast; fp32 for none.
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
    """Peft asks whether autocast is on without saying where, which is about CUDA; let it hear of the CPU's."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": asked(device)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def held_by(optim: str, shapes: Iterable[Sequence[int]]) -> int:
    """Return the bytes on the card of an optimizer's state.

    bitsandbytes keeps a tensor of less than 4,096 values in 32 bit, 8-bit scales in blocks of 256, and pages what has
    100,000 values or more. Adafactor keeps the sums of rows and columns of a matrix.

    Args:
        optim: One of TRL's names; one whose state is not known here counts as AdamW.
        shapes: Of the tensors that are trained.
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
    """Values that Adafactor keeps of a tensor."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def example_pack(config: LlavaConfig, tokens: int, *, learned: float, samples_per_image: int) -> Pack:
    """A pack of so many tokens, about `learned` of them learned; the others belong to one image or more.

    Every image is shared by `samples_per_image` samples, as far as there is room. A pack always has room for an
    image and a few words: one that is shorter is made longer.
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
    """A pack as the model takes it, with pixels of nothing; to be called outside of a FakeTensorMode."""
    vision: Any = config.vision_config
    side = vision.image_size
    return {**pack_tensors(pack), "pixel_values": torch.zeros(len(pack.images), 3, side, side)}

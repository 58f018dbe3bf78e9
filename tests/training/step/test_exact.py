"""Shortcuts of the forward pass: each computes the same with less, and only what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qllava.config import InputError
from qllava.models.adapter import add_lora
from qllava.models.assemble import assemble
from qllava.models.lora import Lora
from qllava.training.step import exact
from qllava.training.step.exact import lora_first, prune_last_layer, stop_tower, teach_packs
from tests.tiny_runs import Tiny

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def a_tower(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SMALL)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**SMALL, vision_use_head=False)).eval()


class _Llava:
    """As much of a LLaVA as a tower needs around it."""

    def __init__(self, tower: Any) -> None:
        self.model = type("Model", (), {"vision_tower": tower})()


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2, 3])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_that_stops(kind: str, layer: int) -> None:
    tower = a_tower(kind)
    computed: list[int] = []
    for number, module in enumerate(tower.encoder.layers):
        module.register_forward_hook(lambda *_, number=number: computed.append(number))
    pixels = torch.randn(2, 3, 32, 32)
    stop_tower(_Llava(tower))
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True).hidden_states[layer]
        assert computed == [0, 1, 2]
        computed.clear()
        found = tower.features_at(pixels, layer)
    assert torch.equal(found, wanted)
    assert computed == list(range(layer % 4))


def test_only_layers_that_are_known_are_pruned() -> None:
    llama = LlamaModel(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    llama.layers[0] = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="expected a decoder layer of a LLaMA or Mistral, got Linear"):
        prune_last_layer(llama)


class TestLoraFirst:
    def passes(
        self, tiny: Tiny, first: bool, four_bit: bool, rank: int = 4, dropout: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """Output and gradients of a layer that is recomputed, and how often its last base product was computed."""
        assembled = assemble(tiny.recipe(load_in_4bit=four_bit))
        torch.manual_seed(0)
        model = add_lora(assembled, Lora(rank, 2 * rank, dropout)).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if first:
            lora_first(model)
        language_model: Any = assembled.model.model.language_model
        products: list[int] = []
        language_model.layers[0].mlp.down_proj.base_layer.register_forward_hook(lambda *_: products.append(1))
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
        given = torch.randn(1, 5, 64, requires_grad=True)
        out = language_model(inputs_embeds=given, use_cache=False).last_hidden_state
        # Not its square: a norm comes last, and no weight changes its length.
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        learned = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return out.detach(), {**learned, "input": given.grad}, len(products)  # type: ignore[dict-item]

    @pytest.mark.parametrize("rank", [2, 16], ids=["small", "large"])
    @pytest.mark.parametrize("four_bit", [True, False], ids=["4 bit", "whole"])
    def test_is_the_same(self, tiny: Tiny, four_bit: bool, rank: int) -> None:
        (out, gradients, products), (wanted, expected, _) = (
            self.passes(tiny, first, four_bit, rank) for first in (True, False)
        )
        assert (products == 0) is (rank == 16)  # one that is large is a part of the weight
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected.keys() and len(gradients) == 2 * 2 * 7 + 1
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    def test_a_large_one_with_dropout_stays_by_itself(self, tiny: Tiny) -> None:
        assert self.passes(tiny, True, True, rank=16, dropout=0.1)[2] > 0

    def test_saves_the_last_base_product_of_a_layer_that_is_recomputed(self, tiny: Tiny) -> None:
        assert self.passes(tiny, False, True)[2] == 2
        assert self.passes(tiny, True, True)[2] == 1

    @pytest.mark.parametrize(
        ("changes", "said"), [({"use_dora": True}, "use_dora True"), ({"bias": "all"}, "bias 'all'")]
    )
    def test_another_function_than_loras_is_not_computed_as_lora(self, changes: dict[str, Any], said: str) -> None:
        """DoRA scales the sum of base and delta: computed before its base, it would silently train as plain LoRA."""
        config = LoraConfig(r=2, target_modules=["0"], **changes)
        adapted: Any = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config).train()
        with pytest.raises(InputError, match=f"has {next(iter(changes))} .* in its adapter_config.json"):
            lora_first(adapted)
        assert "forward" not in vars(adapted.base_model.model[0]), "peft's own forward pass"

    def test_an_adapter_that_is_switched_off_stays_so(self, tiny: Tiny) -> None:
        assembled = assemble(tiny.recipe())
        model = add_lora(assembled, Lora(4, 8)).train()
        layer: Any = assembled.model.model.language_model.layers[0].mlp.up_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        lora_first(model)
        x = torch.randn(1, 3, 64)
        assert isinstance(layer.base_layer, Linear4bit)
        with model.disable_adapter():
            off = layer(x)
        assert torch.equal(off, layer.base_layer(x)) and not torch.allclose(off, layer(x))


def test_logits_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(23, 8, requires_grad=True), torch.randint(50, (23,))
    whole = exact._scores(head, hidden, targets)
    (wanted,) = torch.autograd.grad(whole[0].sum(), hidden)
    monkeypatch.setattr(exact, "MOST_LOGITS", 50 * 7)
    sizes: list[int] = []
    head.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    pieces = exact._scores(head, hidden, targets)
    (found,) = torch.autograd.grad(pieces[0].sum(), hidden)
    torch.testing.assert_close(pieces, whole)  # how a product rounds may depend on its packs: it does on an AMD EPYC
    torch.testing.assert_close(found, wanted)
    assert max(sizes) == 7


def test_packs_leave_other_calls_alone(tiny: Tiny) -> None:
    assembled = assemble(tiny.recipe())
    model: Any = assembled.model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        teach_packs(model)
        stop_tower(model)
        prune_last_layer(model.model.language_model)
        assert torch.equal(model(input_ids=ids).logits, wanted)
        assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > 3

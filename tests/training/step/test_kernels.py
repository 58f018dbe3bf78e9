"""Kernels of attention by packs: each computes what `groups` does, and a device gets one that is there and agrees."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qllava.data.packing import Group
from qllava.training.step import attention
from qllava.training.step.attention import Sight, by_groups, flex, varlen
from qllava.training.step.exact import compiled
from qllava.training.step.kernels import choose, choose_layers, fastest, layer_trial

GROUPS = (Group(0, 3, (2, 1)), Group(6, 0, (4,)), Group(10, 5, (3,)))
HEADS, SHARED, WIDTH = 4, 2, 16


def a_pack(heads: Sequence[int] = (HEADS, SHARED, SHARED)) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, n, GROUPS[-1].end, WIDTH, requires_grad=True) for n in heads]


def sight(learned: Sequence[int] = (4, 5, 7, 9, 15, 17), counts: Sequence[int] = (1, 1, 2, 2)) -> Sight:
    return Sight(GROUPS, torch.tensor(learned), counts)


def seen_by_hand() -> Tensor:
    """(S, S): who sees whom, token by token."""
    group, branch = [], []
    for number, of in enumerate(GROUPS):
        for k, length in enumerate((of.prefix, *of.branches)):
            group += [number] * length
            branch += [k] * length
    size = len(group)
    return torch.tensor(
        [
            [group[q] == group[k] and branch[k] in (0, branch[q]) and k <= q for k in range(size)]
            for q in range(size)
        ]
    )  # fmt: skip


def passes(out: Tensor, given: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), given)]


def dense(given: list[Tensor], places: Tensor | None = None) -> list[Tensor]:
    query, key, value = given
    mask = seen_by_hand()
    if places is not None:
        query, mask = query[:, :, places], mask[places]
    return passes(scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True), given)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_groups() -> None:
    given = a_pack()
    assert_same(passes(by_groups(*given, sight()), given), dense(given))


def test_groups_at_the_learned_places() -> None:
    given, who = a_pack(), sight()
    few = by_groups(given[0][:, :, who.learned], *given[1:], who)
    assert_same(passes(few, given), dense(given, who.learned))


def test_a_branch_in_which_nothing_is_learned() -> None:
    given, who = a_pack(), sight((4, 9), (1, 0, 1, 0))
    few = by_groups(given[0][:, :, who.learned], *given[1:], who)
    assert_same(passes(few, given), dense(given, who.learned))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, as a CPU runs it: the mask is what is tested."""
    monkeypatch.setattr(attention, "_compiled", lambda: flex_attention)
    given = [x.detach() for x in a_pack()]  # on a CPU it has no way back
    torch.testing.assert_close(flex(*given, sight()), dense(a_pack())[0], rtol=1e-5, atol=1e-5)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch documents of its kernel, piece by piece: causal from the bottom right."""
    assert window_size == (-1, 0) and query_ends.dtype == key_ends.dtype == torch.int32
    assert (most_queries, most_keys) == (int(query_ends.diff().max()), int(key_ends.diff().max()))
    out = []
    for n in range(len(query_ends) - 1):
        q = query[query_ends[n] : query_ends[n + 1]].transpose(0, 1)[None]
        k, v = (x[key_ends[n] : key_ends[n + 1]].transpose(0, 1)[None] for x in (key, value))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(out, dim=1).transpose(0, 1)


def test_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs on CUDA alone: a stand-in shows that it is asked the right thing."""
    stand_in = ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = _variable_length  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    given = a_pack()
    assert_same(passes(varlen(*given, sight()), given), dense(given))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kernel", [varlen, flex], ids=["varlen", "flex"])
def test_on_a_gpu(kernel: Any) -> None:
    given = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in a_pack()]
    who = sight()
    who.learned = who.learned.cuda()
    wanted, found = by_groups(*given, who), kernel(*given, who)
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()


class TestChoice:
    def test_on_a_cpu(self) -> None:
        config = LlamaConfig(hidden_size=64, num_attention_heads=4)
        assert choose(config, torch.device("cpu"), torch.float32).kernel == "groups"

    def test_the_fastest_that_agrees(self) -> None:
        def slow(pack: list[Tensor]) -> list[Tensor]:
            time.sleep(0.02)
            return [pack[0] * 2]

        def missing(pack: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("no such kernel")

        chosen = fastest([torch.ones(3)], {"groups": slow, "varlen": lambda pack: [pack[0] * 2], "flex": missing})
        assert chosen.kernel == "varlen"
        assert "flex is not available (RuntimeError)" in chosen.why and "groups" in chosen.why

    def test_one_that_is_wrong_is_left_out(self) -> None:
        def right(pack: list[Tensor]) -> list[Tensor]:
            time.sleep(0.01)
            return [pack[0] * 2]

        chosen = fastest([torch.ones(3)], {"groups": right, "flex": lambda pack: [pack[0] * 2.1]})
        assert chosen.kernel == "groups" and "flex differs by 5.0%" in chosen.why
        nan = fastest([torch.ones(3)], {"groups": right, "flex": lambda pack: [pack[0] * float("nan")]})
        assert nan.kernel == "groups"

    @pytest.mark.parametrize("place", range(3))
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_one_that_is_not_finite_anywhere_is_left_out(self, place: int, value: float) -> None:
        def fast(pack: list[Tensor]) -> list[Tensor]:
            return [pack[0] * (value if index == place else 2) for index in range(3)]

        def slow(pack: list[Tensor]) -> list[Tensor]:
            time.sleep(0.005)
            return [pack[0] * 2] * 3

        chosen = fastest([torch.ones(3)], {"groups": slow, "flex": fast})
        assert chosen.kernel == "groups" and "flex computes values that are not finite" in chosen.why

    def test_a_resumed_run_keeps_its_own(self) -> None:
        """Whatever is faster today: two kernels round differently."""

        def slow(pack: list[Tensor]) -> list[Tensor]:
            time.sleep(0.02)
            return [pack[0] * 2]

        def missing(pack: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("no such kernel")

        trials = {"groups": lambda pack: [pack[0] * 2], "varlen": slow, "flex": missing}
        kept = fastest([torch.ones(3)], trials, "varlen")
        assert (kept.kernel, kept.why) == ("varlen", "as in the checkpoint")
        gone = fastest([torch.ones(3)], trials, "flex")
        assert gone.kernel == "groups"
        assert gone.why.startswith("flex, which the checkpoint had, is not available (RuntimeError), groups ")

    @pytest.mark.parametrize(
        ("asked", "kernel", "why"),
        [
            (None, "plain", "default without CUDA"),
            (True, "compiled", "set by compile_layers"),
            (False, "plain", "set by compile_layers"),
        ],
    )
    def test_layers_on_a_cpu(self, asked: bool | None, kernel: str, why: str) -> None:
        chosen = choose_layers(LlamaConfig(), torch.device("cpu"), torch.float32, asked)
        assert chosen.kernel == kernel and why in chosen.why

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_layers_are_tried_forward_and_backward(self) -> None:
        norm = LlamaRMSNorm(16).requires_grad_(False)
        pack = [torch.randn(1, 5, width) for width in (16, 24, 24)]
        plain, fused = (layer_trial(norm, how)(pack) for how in (lambda function: function, compiled))
        assert [x.shape for x in plain] == [pack[n].shape for n in (0, 1, 0, 1, 2)]
        for a, b in zip(fused, plain, strict=True):
            torch.testing.assert_close(a, b)

"""The estimate against what a real step allocates; the choices of `fit`; recomputation of some layers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

from benchmarks import shapes
from qllava.config import InputError
from qllava.image_layout import ImageLayout
from qllava.models import ledger
from qllava.models.adapter import add_lora, train_projector_only
from qllava.models.assemble import Assembled
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training import memory
from qllava.training.memory import GB, DoesNotFit, Setup, estimate, fit, parse_bytes
from qllava.training.memory.fake import example_pack, fake_llava, held_by, llava_of, tensors_of
from qllava.training.memory.step import measured_once
from qllava.training.settings import TrainConfig
from qllava.training.step.attention import looking_at


def small(*, vocabulary: int = 4000, layers: int = 4, side: int = 112) -> LlavaConfig:
    """The benchmark's shape, a quarter as wide: 64 image tokens, some 30 MB of weights."""
    config: Any = shapes.cpu_bench()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 704, layers
    text.num_attention_heads = text.num_key_value_heads = 4
    text.vocab_size, config.image_token_index = vocabulary, vocabulary - 1
    config.vision_config.image_size = side
    return config  # type: ignore[no-any-return]


def of_rank(r: int) -> Lora | None:
    """Plain LoRA, or none."""
    return Lora(r, r) if r else None


def on_cpu(config: LlavaConfig, lora_r: int = 8, **changes: Any) -> Setup:
    return replace(Setup(config, of_rank(lora_r), torch.float32, device="cpu"), **changes)


def real_llava(config: LlavaConfig, lora: Lora | None) -> Any:
    """The same model as `fake_llava`'s, of real tensors, quantized by bitsandbytes itself."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(copy.deepcopy(config))
    for layer in model.model.language_model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32)
                weight = bnb.nn.Params4bit(linear.weight.data, False, quant_type="nf4", module=packed)
                packed.weight, packed.support_avx512bf16_for_cpu = weight.to("cpu"), False
                layer.set_submodule(name, packed)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    assembled = Assembled(model, None, Recipe("", None, None, "mlp2x_gelu", -2, "pad", "", True))  # type: ignore[arg-type]
    adapted: Any = add_lora(assembled, lora) if lora else train_projector_only(assembled)
    return adapted.train()


def pack_of(setup: Setup) -> dict[str, Any]:
    pack = example_pack(
        setup.config, setup.tokens_per_pack, learned=setup.learned, samples_per_image=setup.samples_per_image
    )
    return tensors_of(setup.config, pack)


def there_and_back(model: Any, pack: dict[str, Any], dtype: torch.dtype = torch.float32) -> float:
    inner = getattr(model, "module", model)  # of DDP's
    with looking_at(llava_of(inner).model.language_model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            log_probs: torch.Tensor = model(**pack).log_probs
        loss = -log_probs.sum() / len(log_probs)
        del log_probs
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


def peak_of_a_real_step(setup: Setup) -> int:
    """Bytes that torch's CPU allocator had given out at most in an optimizer's second step, of two packs."""
    given = pack_of(setup)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = real_llava(setup.config, setup.lora)
        memory.prepare(model, setup, setup.layers[1])
        if setup.processes > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        pack = {key: value.clone() if torch.is_tensor(value) else value for key, value in given.items()}
        for step in range(2):
            if step:
                torch.profiler.record_function("second").__enter__().__exit__(None, None, None)
            for _ in range(2):
                there_and_back(model, pack, setup.dtype)
            optimizer.step()
            optimizer.zero_grad()
        # What is freed outside is never taken off the allocator's count.
        del model, optimizer, pack
        gc.collect()
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    begun = min(event.start_time_ns for event in events if event.name == "second")
    counts = [event for event in events if hasattr(event.extra_fields, "total_allocated")]
    first = min(counts, key=lambda event: event.start_time_ns).extra_fields
    before: int = first.total_allocated - first.alloc_size
    return max(e.extra_fields.total_allocated for e in counts if e.start_time_ns > begun) - before


def _events(tree: list[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


class TestAgainstTheTruth:
    """What torch's own allocator counted, within a tenth: within a thousandth, in fact."""

    @pytest.mark.parametrize("tokens", [256, 700])
    @pytest.mark.parametrize("recomputed", [0, 2, None])
    @pytest.mark.parametrize("lora_r", [8, 0], ids=["stage 2", "stage 1"])
    def test_peak(self, lora_r: int, recomputed: int | None, tokens: int) -> None:
        setup = on_cpu(small(), lora_r, recompute_layers=recomputed, tokens_per_pack=tokens)
        assert estimate(setup).peak_bytes == pytest.approx(peak_of_a_real_step(setup), rel=0.01)

    @pytest.mark.parametrize("shortcuts", [True, False])
    def test_where_the_layers_are_the_peak(self, shortcuts: bool) -> None:
        """A small vocabulary: what is recomputed, and weights made whole inside bitsandbytes, decide."""
        names = ("stop_tower", "prune_last_layer", "lora_first")
        setup = on_cpu(small(vocabulary=64), tokens_per_pack=100, **dict.fromkeys(names, shortcuts))
        found = estimate(setup)
        assert found.parts["workspace"] >= 256 * 704 * 4
        assert found.peak_bytes == pytest.approx(peak_of_a_real_step(setup), rel=0.01)

    @pytest.mark.parametrize("recomputed", [0, None])
    def test_weights_in_fp32_and_autocast_in_bf16(self, recomputed: int | None) -> None:
        """A run on a CPU holds fp32 whatever it computes in; bitsandbytes then computes in fp32 too."""
        held = on_cpu(
            small(), dtype=torch.bfloat16, held=torch.float32, tokens_per_pack=300, recompute_layers=recomputed
        )
        assert estimate(held).peak_bytes == pytest.approx(peak_of_a_real_step(held), rel=0.01)
        assert estimate(held).parts["weights"] > 1.5 * estimate(replace(held, held=None)).parts["weights"]

    def test_several_processes_keep_the_gradients_twice(self, tmp_path: Path) -> None:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            alone = on_cpu(small(vocabulary=64), 64, tokens_per_pack=100)
            several = replace(alone, processes=2)
            found = peak_of_a_real_step(several)
        finally:
            torch.distributed.destroy_process_group()
        assert estimate(several).peak_bytes == pytest.approx(found, rel=0.01)
        learned = estimate(alone).parts["optimizer"] / 2
        assert estimate(several).peak_bytes - estimate(alone).peak_bytes == pytest.approx(learned, rel=0.01)

    def test_parts_add_up_and_weights_are_what_they_are(self) -> None:
        config = small()
        found = estimate(on_cpu(config))
        assert tuple(found.parts) == memory.PARTS
        assert sum(found.parts.values()) == found.peak_bytes
        lora = sum(p.numel() for name, p in real_llava(config, of_rank(8)).named_parameters() if "lora_" in name)
        assert found.parts["LoRA"] == 2 * 4 * lora  # fp32, and gradients
        projector = 256 * 256 * 2 + 2 * 256
        assert found.parts["projector"] == 3 * 4 * projector  # peft keeps the one that training began with
        assert found.parts["optimizer"] == pytest.approx(8 * (lora + projector), rel=0.001)


class TestExtrapolation:
    """A few layers tell what all of them take."""

    @pytest.mark.parametrize("changes", [{}, {"prune_last_layer": False, "lora_first": False}, {"lora": None}])
    @pytest.mark.parametrize("recomputed", [0, 1, 4, None])
    def test_equals_the_whole_step(self, recomputed: int | None, changes: dict[str, Any]) -> None:
        # On the CPU, where no allowance for a card hides a difference; a vocabulary that makes the layers the peak.
        setup = on_cpu(small(vocabulary=64, layers=7), tokens_per_pack=150, recompute_layers=recomputed, **changes)
        few, all_of_them = estimate(setup), estimate(setup, whole=True)
        assert few.peak_bytes == pytest.approx(all_of_them.peak_bytes, rel=0.001)
        for part, size in all_of_them.parts.items():
            assert abs(few.parts[part] - size) <= 0.001 * all_of_them.peak_bytes, part

    @pytest.mark.slow
    def test_at_7b(self) -> None:
        setup = Setup(shapes.llava_7b(), of_rank(16))
        assert estimate(setup).peak_bytes == pytest.approx(estimate(setup, whole=True).peak_bytes, rel=0.01)


class TestRealSizes:
    """LLaVA-1.5 on the cards that the presets are for, with packs as long as LLaVA's longest sample."""

    @pytest.mark.parametrize(("config", "card"), [(shapes.llava_7b, 8), (shapes.llava_13b, 12)], ids=["7B", "13B"])
    def test_r16_fits(self, config: Any, card: int) -> None:
        found = estimate(Setup(config(), of_rank(16)))
        # Half a byte a weight, and what is not quantized in 16 bit: a formula that is right within a few percent.
        text = config().text_config
        packed = text.num_hidden_layers * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
        least = packed / 2 + 4 * text.hidden_size * text.vocab_size + 2 * 0.3e9
        assert least < found.parts["weights"] < 1.05 * least
        assert found.peak_bytes <= card * 1e9  # and so 2^30 of them
        assert found.peak_bytes > 0.8 * card * 1e9


class TestFit:
    """The limit holds, what is free is used, and what is set stays."""

    setup = Setup(small(layers=8, side=336), of_rank(8))  # 576 image tokens

    def test_a_tighter_limit_recomputes_more_or_reads_less_at_once(self) -> None:
        seen = []
        for limit in (3000, 800, 700, 640):
            plan = fit(self.setup, limit << 20, least_tokens=700, most_tokens=2048)
            assert plan.fits and plan.estimate.peak_bytes <= limit << 20
            assert plan.tokens_per_pack in (2048, 1024, 700)
            chosen = replace(
                self.setup,
                tokens_per_pack=plan.tokens_per_pack,
                recompute_layers=plan.recompute_layers,
                optim=plan.optim,
            )
            assert estimate(chosen) == plan.estimate
            seen.append((2 + plan.recompute_layers / 8) * (1 + 300 / plan.tokens_per_pack))
        assert seen == sorted(seen) and len(set(seen)) >= 3
        assert seen[0] == 2 * (1 + 300 / 2048)

    def test_no_pack_that_is_never_filled(self) -> None:
        plan = fit(self.setup, 8 * GB, least_tokens=300, most_tokens=1800)
        assert (plan.tokens_per_pack, plan.recompute_layers) == (1800, 0)

    def test_what_is_set_stays(self) -> None:
        mine = replace(self.setup, tokens_per_pack=800, recompute_layers=3, optim="adamw_bnb_8bit")
        plan = fit(mine, 8 * GB, fixed=("tokens_per_pack", "recompute_layers", "optim"))
        assert (plan.tokens_per_pack, plan.recompute_layers, plan.optim) == (800, 3, "adamw_bnb_8bit")

    def test_the_optimizer_gives_way_last(self) -> None:
        big = replace(self.setup, lora=of_rank(512))
        least = estimate(replace(big, tokens_per_pack=700)).peak_bytes
        assert fit(big, least, least_tokens=700, most_tokens=700).optim == "adamw_torch_fused"
        assert fit(big, least - (20 << 20), least_tokens=700, most_tokens=700).optim == "paged_adamw_8bit"

    def test_a_refusal_says_by_how_much_and_what_would_do(self) -> None:
        big = replace(self.setup, lora=of_rank(256), recompute_layers=0)
        enough_for_16 = estimate(replace(big, lora=of_rank(16), tokens_per_pack=2000, recompute_layers=None)).peak_bytes
        with pytest.raises(DoesNotFit) as refused:
            fit(big, enough_for_16, least_tokens=2000, most_tokens=2000)
        plan = refused.value.plan
        assert plan.fits is False and plan.tokens_per_pack == 2000
        assert plan.recompute_layers == 7 and plan.optim == "paged_adamw_8bit"
        missing = memory.format_bytes(plan.estimate.peak_bytes - enough_for_16)
        said = str(refused.value)
        assert said == plan.suggestion and said.endswith(" It would fit with lora_r 16 or a GPU with 4 GB.")
        assert f"{missing} more than the {memory.format_bytes(enough_for_16)}" in said
        assert isinstance(refused.value, InputError)
        with pytest.raises(DoesNotFit, match="It would fit with a smaller model or a GPU with 4 GB"):
            fit(big, 400 << 20, least_tokens=2000, most_tokens=2000)

    def test_short_data_and_long_data(self) -> None:
        plan = fit(self.setup, 8 * GB, least_tokens=5, most_tokens=20)
        assert plan.tokens_per_pack == ImageLayout.of_config(self.setup.config).tokens + 4  # room for an image
        assert fit(self.setup, 8 * GB, least_tokens=9000, most_tokens=9000).tokens_per_pack == 9000


def test_a_setup_is_measured_once() -> None:
    """Whatever its optimizer; and again when anything else changes, inside its configuration too."""
    asked: list[Setup] = []
    measure = measured_once(lambda setup, *numbers: asked.append(setup) or len(asked))
    setup = on_cpu(small())
    same = replace(setup, config=small(), optim="sgd", tokens_per_pack=9, recompute_layers=0)
    assert (measure(setup, 1, 2), measure(same, 1, 2), measure(setup, 2, 1)) == (1, 1, 2)
    others = [replace(setup, lora=of_rank(9)), replace(setup, held=torch.float16), replace(setup, lora_first=False)]
    assert [measure(other, 1, 2) for other in (*others, replace(setup, config=small(side=126)))] == [3, 4, 5, 6]
    setup.config.text_config.hidden_act = "relu"
    assert measure(setup, 1, 2) == 7


def test_settings_become_a_setup() -> None:
    config = small()
    train = TrainConfig(output_dir="x", tokens_per_pack=900, recompute_layers=2, share_image_prefix=False, use_cpu=True)
    lora = Lora(4, 8, 0.1)
    setup = memory.setup_of(train, config, lora, load_in_4bit=False)
    assert setup == Setup(
        config,
        lora,
        torch.float32,
        torch.float32,
        "cpu",
        False,
        tokens_per_pack=900,
        recompute_layers=2,
        samples_per_image=1,
    )
    assert memory.settled(train) == {"tokens_per_pack", "recompute_layers"}
    assert memory.settled(TrainConfig(output_dir="x")) == set()
    assert memory.settled(TrainConfig(output_dir="x", gradient_checkpointing=False)) == {"recompute_layers"}
    assert memory.settled(TrainConfig(output_dir="x", optim="paged_adamw_8bit")) == {"optim"}


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * GB), ("7.5 GiB", 15 * GB // 2), ("900mb", 900 << 20), (" 8G ", 8 * GB)]
)
def test_amounts(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "GB", "-3GB", "0GB", "a lot", "12TB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="Write it like 12GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("adamw_bnb_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_32bit", bnb.optim.AdamW32bit),
        ("adamw_torch", bnb.optim.AdamW32bit),
        ("lion_8bit", bnb.optim.Lion8bit),
        ("paged_lion_32bit", bnb.optim.Lion32bit),
        ("rmsprop_bnb_8bit", bnb.optim.RMSprop8bit),
        ("ademamix_8bit", bnb.optim.AdEMAMix8bit),
        ("ademamix", bnb.optim.AdEMAMix),
    ],
)
def test_optimizers_are_counted_as_bitsandbytes_makes_them(optim: str, kind: Any) -> None:
    """Its 8-bit moments run on the CPU; of paged ones it says itself that none is paged there, so count by hand."""
    sizes = [100, 5000, 200_000]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    made = kind(parameters)
    expected = 0
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        made.init_state(made.param_groups[0], parameter, 0, 0)
        state = made.state[parameter]
        moments = sum(state[name].nbytes for name in ("state1", "state2") if name in state)
        scales = sum(state[name].nbytes for name in ("absmax1", "absmax2") if name in state)
        expected += scales + (0 if "paged" in optim and parameter.numel() >= 1e5 else moments)
    assert held_by(optim, [(size,) for size in sizes]) == expected


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad", "rmsprop", "adamw_torch_fused"])
def test_optimizers_are_counted_as_torch_makes_them(optim: str, tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7,), (30, 50), (2, 8, 9))]
    trained = nn.ParameterList(parameters)
    make, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=optim), trained)
    made = make(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    states = [value for state in made.state.values() for value in state.values() if torch.is_tensor(value)]
    held = sum(value.nbytes for value in states if value.dim())
    assert held_by(optim, [p.shape for p in parameters]) == held


@pytest.mark.parametrize("lora_r", [8, 0])
def test_a_fake_model_is_the_real_one_without_bytes(lora_r: int) -> None:
    config = shapes.tiny()
    real = real_llava(config, of_rank(lora_r))
    with FakeTensorMode():
        fake = fake_llava(config, load_in_4bit=True, dtype=torch.float32, lora=of_rank(lora_r))
    own = dict(fake.named_parameters())
    for name, parameter in real.named_parameters():
        assert isinstance(own[name], FakeTensor)
        assert (own[name].shape, own[name].dtype, own[name].requires_grad) == (
            parameter.shape,
            parameter.dtype,
            parameter.requires_grad,
        ), name
    assert len(own) == len(list(real.named_parameters()))
    ledger.check(fake)


def test_what_is_shared_is_counted_once() -> None:
    tied = small()
    tied.tie_word_embeddings = tied.text_config.tie_word_embeddings = True
    saved = estimate(on_cpu(small())).parts["weights"] - estimate(on_cpu(tied)).parts["weights"]
    assert saved == 4000 * 256 * 4


@pytest.mark.parametrize("tokens", [5, 68, 300, 2048])
@pytest.mark.parametrize(("learned", "samples", "mark"), [(0.1, 1, 3), (0.5, 2, None), (1.0, 3, 2)])
def test_an_example_pack_is_as_long_as_asked(tokens: int, learned: float, samples: int, mark: int | None) -> None:
    """Whatever the id of `<image>` is: no word has the same."""
    config = small()
    config.image_token_index = config.image_token_index if mark is None else mark
    each = ImageLayout.of_config(config).tokens
    pack = example_pack(config, tokens, learned=learned, samples_per_image=samples)
    assert len(pack.input_ids) == max(tokens, each + 4)
    assert len(pack.image_places) == each * len(pack.images) > 0
    assert len(pack.ids) == len(pack.images) * samples or tokens < 100


@pytest.mark.parametrize("layers", [0, 1, 3, None])
@pytest.mark.parametrize("pruned", [True, False])
def test_recomputation_changes_no_gradient(layers: int | None, pruned: bool) -> None:
    config = shapes.tiny()
    setup = on_cpu(config, tokens_per_pack=60, prune_last_layer=pruned)
    model = real_llava(config, of_rank(8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    pack = pack_of(setup)
    memory.prepare(model, setup, 0)
    calls: list[int] = []
    decoders = llava_of(model).model.language_model.layers
    for index, layer in enumerate(decoders):
        layer.self_attn.k_proj.register_forward_hook(lambda *_, index=index: calls.append(index))
    found = []
    for again in (0, layers):
        memory.recompute(llava_of(model).model.language_model, again)
        calls.clear()
        model.zero_grad()
        loss = there_and_back(model, pack)
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    most = len(decoders) - int(pruned)
    twice = most if layers is None else layers
    assert [calls.count(index) for index in range(len(decoders))] == [2] * twice + [1] * (len(decoders) - twice)
    (plain, expected), (again_loss, got) = found
    assert plain == again_loss and expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

"""What a plan says of each phase, beside what torch's allocator gives out while a real model goes through it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from qllava.config import NANO_WEIGHTS
from qllava.image_layout import ImageLayout
from qllava.inference.generate import continue_prompts
from qllava.models.assemble import load_language_model
from qllava.models.lora import Lora
from qllava.training import memory
from qllava.training.memory import GB, Asking, Setup, estimate, phases, phases_of
from qllava.training.memory.fake import llava_of
from qllava.training.options.defaults import NANO_FINETUNE
from qllava.training.scores import asking_of, expects_held_out
from qllava.training.settings import TrainConfig, parse
from qllava.training.step.attention import looking_at
from tests.training.memory.test_memory import _events, on_cpu, pack_of, real_llava, small, there_and_back

ASKED = 4
NEW = 12


def allocated(begin: Callable[[], Any], work: Callable[[Any], Any]) -> int:
    """The most bytes that are given out during `work`, what `begin` made included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = begin()
        torch.profiler.record_function("work").__enter__().__exit__(None, None, None)
        kept = work(made)
        del made, kept
        gc.collect()
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    begun = min(event.start_time_ns for event in events if event.name == "work")
    counts = [event for event in events if hasattr(event.extra_fields, "total_allocated")]
    first = min(counts, key=lambda event: event.start_time_ns).extra_fields
    before: int = first.total_allocated - first.alloc_size
    return max(e.extra_fields.total_allocated for e in counts if e.start_time_ns > begun) - before


def trained(setup: Setup, *, steps: int = 0) -> Callable[[], Any]:
    """A model as a run holds it after so many steps, without gradients."""

    def begin() -> Any:
        model = real_llava(setup.config, setup.lora)
        memory.prepare(model, setup, setup.layers[1])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for _ in range(steps):
            there_and_back(model, pack_of(replace(setup, tokens_per_pack=80)))
            optimizer.step()
            optimizer.zero_grad()
        return model.eval(), optimizer

    return begin


def answer(setup: Setup, questions: int, new_tokens: int) -> Callable[[Any], Any]:
    """Answer so many questions at once, of the length that is planned for."""
    config, side = setup.config, setup.config.vision_config.image_size  # type: ignore[union-attr]
    text = phases.TEXT_OF_A_QUESTION
    prompt = [1, *[config.image_token_index] * ImageLayout.of_config(config).tokens, *[5] * (text - 1)]
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def work(made: Any) -> Any:
        pixels = [torch.zeros(1, 3, side, side) for _ in range(questions)]
        return continue_prompts(made[0], [prompt] * questions, pixels, settings)

    return work


def held_out_loss(setup: Setup, tokens: int) -> Callable[[Any], Any]:
    def work(made: Any) -> Any:
        with looking_at(llava_of(made[0]).model.language_model), torch.no_grad():
            return made[0](**pack_of(replace(setup, tokens_per_pack=tokens)))

    return work


class TestAgainstTheTruth:
    """Within a tenth, for each phase beside the step, which has a test of its own."""

    setup = on_cpu(small(), tokens_per_pack=300)
    asking = Asking(before=ASKED, during=ASKED, new_tokens=NEW, held_out_tokens=300)

    @pytest.fixture(scope="class")
    def planned(self) -> dict[str, phases.Phase]:
        return phases_of(self.setup, estimate(self.setup), self.asking)

    def test_answers_before_the_first_step(self, planned: dict[str, phases.Phase]) -> None:
        found = allocated(trained(self.setup), answer(self.setup, ASKED, NEW))
        assert planned["before"].peak(self.setup, GB) == pytest.approx(found, rel=0.1)

    def test_answers_at_an_evaluation(self, planned: dict[str, phases.Phase]) -> None:
        found = allocated(trained(self.setup, steps=1), answer(self.setup, ASKED, NEW))
        assert planned["evaluation"].peak(self.setup, GB) == pytest.approx(found, rel=0.1)

    def test_the_held_out_loss(self, planned: dict[str, phases.Phase]) -> None:
        found = allocated(trained(self.setup, steps=1), held_out_loss(self.setup, 300))
        alone = replace(planned["evaluation"], questions=0)
        assert alone.peak(self.setup) == pytest.approx(found, rel=0.1)

    def test_a_chat(self, planned: dict[str, phases.Phase]) -> None:
        asked = replace(planned["chat"], new_tokens=NEW)
        found = allocated(trained(self.setup), answer(self.setup, 1, NEW))
        assert planned["chat"].new_tokens == phases.CHAT_TOKENS
        assert asked.peak(self.setup) == pytest.approx(found, rel=0.1)

    @pytest.mark.parametrize(("vocabulary", "grows"), [(64, False), (16_000, True)])
    def test_loading(self, vocabulary: int, grows: bool, tmp_path: Path) -> None:
        """The largest weight while it is packed, or a table of embeddings while it grows."""
        config: Any = small(vocabulary=vocabulary, layers=2)
        LlamaForCausalLM(config.text_config).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[arg-type]
        AutoTokenizer.from_pretrained(NANO_WEIGHTS / "llama").save_pretrained(tmp_path)
        tokens = vocabulary + int(grows)

        def load(_: Any) -> Any:
            return load_language_model(str(tmp_path), torch.float32, "cpu", four_bit=True, tokens=tokens)

        found = allocated(lambda: None, load)
        model = load(None)
        states = [w.quant_state for w in model.parameters() if hasattr(w, "quant_state")]
        held = sum(w.nbytes for w in model.parameters()) + sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
        config.text_config.vocab_size = model.config.vocab_size
        assert held + phases._loading(on_cpu(config)) == pytest.approx(found, rel=0.1)


class TestChoice:
    """What answers may take, and what does not fit."""

    setup = Setup(small(side=336), Lora(8, 8))

    def test_answers_shrink_to_what_fits(self) -> None:
        phase = phases.Phase(GB, 0, 32, 48)
        one, every = phase.peak(self.setup), phase.peak(self.setup, 64 * GB)
        assert one < phase.peak(self.setup, (one + every) // 2) <= (one + every) // 2 < every
        assert phase.peak(self.setup, GB) == one  # does not fit, and no batch can be smaller

    def test_a_plan_fits_when_all_phases_do(self) -> None:
        setup = replace(self.setup, tokens_per_pack=700)
        step = estimate(setup)
        asking = Asking(before=12, during=32)
        plan = memory.plan_of(setup, step, step.peak_bytes + GB, replace(asking, held_out_tokens=700))
        assert plan.fits and plan.peak_bytes == max(plan.phases.values()) <= step.peak_bytes + GB
        assert list(plan.phases) == list(phases.PHASES) and plan.phases["step"] == step.peak_bytes
        large = replace(step, resident={**step.resident, "weights": 2 * step.peak_bytes})
        refused = memory.plan_of(setup, large, step.peak_bytes, asking)
        assert refused.fits is False and "even with one question at a time" in refused.suggestion
        assert refused.suggestion.count(".") >= 1 and refused.suggestion.endswith(".")

    @pytest.mark.parametrize("in_4bit", [True, False])
    @pytest.mark.parametrize(
        ("worst", "passing", "questions", "off"),
        [("before", 2 * GB, 0, False), ("before", 0, 12, True), ("evaluation", 0, 12, True), ("chat", 0, 1, False)],
    )
    def test_the_advice_helps_the_worst_phase(
        self, monkeypatch: pytest.MonkeyPatch, worst: str, passing: int, questions: int, off: bool, in_4bit: bool
    ) -> None:
        """Without evaluation a model is loaded, and asked in a chat, all the same."""
        setup = replace(self.setup, load_in_4bit=in_4bit)
        every = {name: phases.Phase(1000) for name in phases.PHASES} | {
            worst: phases.Phase(GB - 1000, passing, questions, 48)
        }
        monkeypatch.setitem(memory.plan_of.__globals__, "phases_of", lambda *_: every)
        step = memory.Estimate(1000, {}, {})
        said = memory.plan_of(setup, step, GB).suggestion
        assert said.startswith(f"The phase '{worst}' needs ") and "use a smaller model" in said
        assert ("set eval_strategy no" in said) == off
        assert ("load_in_4bit true" in said) == (not in_4bit)
        assert ("even with one question at a time" in said) == bool(questions)

    def test_what_a_run_asks(self) -> None:
        train = TrainConfig(output_dir="x", per_device_eval_batch_size=2, max_length=700, use_cpu=True)
        assert asking_of(train, Lora(8, 8), held_out=False) == Asking()
        # Without evaluations during the run, the end has them all the same.
        assert asking_of(train, Lora(8, 8), held_out=True) == Asking(12, train.eval_questions_final, 48, 1400)
        assert asking_of(train, None, held_out=True) == Asking(held_out_tokens=1400)
        train.eval_questions_final = 0
        assert asking_of(train, Lora(8, 8), held_out=True).during == 12, "those that the report shows"
        train.eval_strategy = "steps"  # type: ignore[assignment]
        assert asking_of(train, Lora(8, 8), held_out=True) == Asking(12, train.eval_questions, 48, 1400)
        train.eval_questions = 0
        assert asking_of(train, Lora(8, 8), held_out=True) == Asking(held_out_tokens=1400)

    def test_which_plans_count_held_out_packs(self) -> None:
        def expected(*line: str) -> bool:
            return expects_held_out(parse(line, output_dir="x", nano=NANO_FINETUNE))

        other = ("--model_name_or_path", "some/llava", "--train_file", "a.json")
        assert not expected(*other)
        assert expected(*other, "--eval_file", "b.json"), "without eval_strategy it is measured at the end"
        assert expected(*other, "--eval_strategy", "steps"), "a preset, whose eval_file comes with the command"
        assert expected() and expected("--eval_strategy", "no")
        assert not expected("--train_file", "a.json", "--eval_strategy", "no")

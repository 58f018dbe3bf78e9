"""How often a stage evaluates where the user has not said, and what needs its evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qllava.config import InputError
from qllava.training import evaluations
from qllava.training.run import finetune
from qllava.training.settings import TrainConfig
from qllava.training.trainer import LlavaTrainer
from tests.tiny_runs import Tiny, refusal, stage2_settings


def a_stage(*, train: int, held_out: int | None, questions: int = 0, **fields: Any) -> Any:
    """Samples of 100 tokens each."""
    values = {"output_dir": "x", "eval_strategy": "steps", "per_device_train_batch_size": 4, "use_cpu": True, **fields}
    return SimpleNamespace(
        config=TrainConfig(**values),
        train=SimpleNamespace(lengths=np.full(train, 100)),
        evaluation=None if held_out is None else SimpleNamespace(lengths=np.full(held_out, 100)),
        questions=[None] * questions,
    )


def settled(**values: Any) -> tuple[str, int | None]:
    stage = a_stage(**values)
    evaluations.settle(stage.config, stage.train, stage.evaluation, len(stage.questions))
    return str(getattr(stage.config.eval_strategy, "value", stage.config.eval_strategy)), stage.config.eval_steps


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"train": 400, "held_out": 100}, 10),  # 100 steps, ten times: an evaluation costs a twelfth
        ({"train": 400, "held_out": 100, "num_train_epochs": 2}, 20),
        ({"train": 400, "held_out": 300}, 25),  # a quarter of the training: four times
        ({"train": 400, "held_out": 100, "questions": 100}, 25),  # an answer is 148 tokens: 4.8 times
        ({"train": 400, "held_out": 100, "max_steps": 30}, 10),  # 30 of 100 steps: three times
        ({"train": 400, "held_out": 100, "eval_steps": 7}, 7),  # as asked
    ],
)
def test_about_ten_times(values: dict[str, Any], steps: int) -> None:
    assert settled(**values) == ("steps", steps)


@pytest.mark.parametrize(
    ("samples", "fields", "steps"), [(40, {}, 5), (41, {}, 5), (4, {}, 1), (40, {"eval_steps": 7}, 7)]
)
def test_twice_in_nanos_own_run(samples: int, fields: dict[str, Any], steps: int) -> None:
    stage = a_stage(train=samples, held_out=8, **fields)
    evaluations.few(stage.config, samples)
    assert stage.config.eval_steps == steps


def test_at_the_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert settled(train=10, held_out=100)[0] == "no"
    assert "evaluated only at the end" in capsys.readouterr().out


def test_nothing_is_evaluated_on_start_without_held_out_rows() -> None:
    """Nor in a stage 1 of finetune's own, whose eval_strategy is `no`: transformers looks at neither."""
    for strategy in ("steps", "no"):
        for held_out in (None, 100):
            stage = a_stage(train=400, held_out=held_out, eval_on_start=True, eval_strategy=strategy)
            evaluations.settle(stage.config, stage.train, stage.evaluation, 0)
            assert stage.config.eval_on_start is (held_out is not None)


def test_without_held_out_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert settled(train=10, held_out=None)[0] == "no"
    assert "No eval_file" in capsys.readouterr().out
    assert settled(train=10, held_out=None, eval_strategy="no")[0] == "no"
    assert capsys.readouterr().out == ""


NEEDY: list[dict[str, Any]] = [
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"lr_scheduler_type": "greedy"},
    {"save_strategy": "best", "metric_for_best_model": "eval_loss"},
]


def test_the_last_step_is_measured_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation finds the loss of the result too; the final questions are asked all the same."""
    steps: list[int] = []
    loop = LlavaTrainer.evaluation_loop

    def counted(own: LlavaTrainer, *arguments: Any, **named: Any) -> Any:
        steps.append(own.state.global_step)
        return loop(own, *arguments, **named)

    monkeypatch.setattr(LlavaTrainer, "evaluation_loop", counted)
    found = []
    for when, expected, asked in (("steps", [2, 4], [2, 2, 8]), ("no", [4], [8])):
        chosen = {"eval_strategy": when, "eval_steps": 2, "eval_questions": 2}
        folder = finetune(stage2_settings(tiny, tmp_path / when, **chosen))
        assert steps == expected
        steps.clear()
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found.append({name: results[name] for name in ("eval_loss", "eval_exact_match", "n", "ci95")})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert lines[-1]["step"] == 4 and lines[-1]["eval_loss"] == results["eval_loss"]
        figures = ("eval_entropy", "eval_mean_token_accuracy")
        found[-1] |= {name: lines[-1][name] for name in figures}
        assert [line["eval_exact_match_n"] for line in lines if "eval_loss" in line] == asked
    assert found[0] == found[1] and found[0]["n"] == 8


@pytest.mark.parametrize("needy", NEEDY, ids=lambda fields: "-".join(fields.values()))
def test_what_needs_evaluations_has_them_or_is_refused(needy: dict[str, Any]) -> None:
    assert settled(train=40, held_out=1000, **needy) == ("steps", 1), "ten, whatever they cost"
    config = a_stage(train=10, held_out=10, **needy).config
    evaluations.refuse_unmeasured(config, True)
    for strategy, held_out in (("steps", False), ("no", True)):
        config.eval_strategy = strategy
        with pytest.raises(InputError) as caught:
            evaluations.refuse_unmeasured(config, held_out)
        assert "needs evaluations during the run" in refusal(caught.value)
    evaluations.refuse_unmeasured(TrainConfig(output_dir="x", use_cpu=True), False)


@pytest.mark.parametrize("needy", NEEDY, ids=lambda fields: "-".join(fields.values()))
def test_a_stage_1_of_finetune_needs_none(needy: dict[str, Any]) -> None:
    config = a_stage(train=10, held_out=None, lr_scheduler_kwargs={"factor": 0.5}, **needy).config
    evaluations.leave_out(config)
    assert not evaluations.follows(config)
    if "lr_scheduler_type" in needy:
        assert config.lr_scheduler_type == "cosine" and config.lr_scheduler_kwargs is None

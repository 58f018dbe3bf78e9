"""Grids: what a file asks for, cells that are shared, failed or interrupted, and the figures."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from qllava.cli import main as qllava
from qllava.config import InputError
from qllava.evaluation import scienceqa
from qllava.experiments import report as ablation_report
from qllava.experiments.ablation import Grid, Measured, Variant, read_grid, read_measured, run_grid
from qllava.training.run import finetune, pretrain
from qllava.training.settings import parse
from recipes.scienceqa import write_records
from tests.tiny_models import make_image
from tests.tiny_runs import Tiny, refusal

GRID: dict[str, Any] = {
    "seeds": [1, 2],
    "measure": "vqa {model} test.json",
    "pretrain": {"train_file": "captions.json"},
    "finetune": {"train_file": "train.json", "vision_feature_layer": -2},
    "variants": {
        "as it is": {},
        "last layer": {"vision_feature_layer": -1},
        "lower rank": {"lora_r": 4},
        "no stage 1": {"pretrain": {"max_steps": 1}},
    },
}


def grid_file(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


class Pretend:
    """Leaves the files that the commands would leave, and fails where it is told to."""

    def __init__(self, fail_at: int = -1, checkpoints: Sequence[int] = ()) -> None:
        self.done: list[tuple[str, str]] = []
        self.fail_at, self.checkpoints = fail_at, checkpoints

    def __call__(self, words: Sequence[str], log: Path) -> str:
        if len(self.done) == self.fail_at:
            self.fail_at = -1
            raise InputError("It fails.")
        if words[0] == "eval":
            self.done.append(("eval", words[2]))
            return json.dumps({"accuracy": 0.5, "ci95": [0.4, 0.6]})
        folder = Path(yaml.safe_load(Path(words[2]).read_text())["output_dir"])
        self.done.append((words[0], str(folder)))
        folder.mkdir(parents=True)
        for step in self.checkpoints if words[0] == "finetune_lora" else ():
            (folder / f"checkpoint-{step}").mkdir()
        (folder / "results.json").write_text("{}")
        return ""

    def count(self, name: str) -> int:
        return sum(what == name for what, _ in self.done)


def test_what_makes_the_base_goes_into_both_stages_and_the_rest_into_one(tmp_path: Path) -> None:
    grid = read_grid(grid_file(tmp_path))
    by_name = {variant.name: variant for variant in grid.variants}
    last, lower, without = (by_name[name] for name in ("last layer", "lower rank", "no stage 1"))
    assert last.pretrain == {"vision_feature_layer": -1, "train_file": "captions.json"}
    assert last.finetune["vision_feature_layer"] == -1
    assert lower.pretrain == {"vision_feature_layer": -2, "train_file": "captions.json"}
    assert lower.finetune["lora_r"] == 4
    assert without.pretrain is not None and without.pretrain["max_steps"] == 1 and "max_steps" not in without.finetune
    assert grid.seeds == (1, 2) and without.folder == "no-stage-1" and without.against == "as it is"


def test_every_combination_of_a_grid_is_a_variant(tmp_path: Path) -> None:
    path = grid_file(tmp_path, variants={}, grid={"lora_r": [8, 32], "projector_type": ["linear", "mlp2x_gelu"]})
    found = read_grid(path).variants
    assert [(v.finetune["lora_r"], v.finetune["projector_type"]) for v in found] == [
        (8, "linear"),
        (8, "mlp2x_gelu"),
        (32, "linear"),
        (32, "mlp2x_gelu"),
    ]
    assert found[0].name == "lora_r 8, projector_type linear" and len({v.folder for v in found}) == 4


def test_places_are_made_only_where_they_are_spoken_of(tmp_path: Path) -> None:
    def never() -> Path:
        raise AssertionError("nobody asked for it")

    path = grid_file(tmp_path, measure="vqa {model} {here}/test.json")
    grid = read_grid(path, {"here": lambda: tmp_path, "there": never})
    assert grid.variants[0].measure == f"vqa {{model}} {tmp_path}/test.json"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": {}}, "keys can only be"),
        ({"seeds": []}, "whole numbers"),
        ({"seeds": [1.5]}, "whole numbers"),
        ({"measure": None}, "measure"),
        ({"variants": {}}, "has no variants"),
        ({"variants": {"A b": {}, "a-b": {}}}, "the same folder name"),
        ({"variants": {"aligned": {}}}, "named `aligned`, which is reserved"),
        ({"variants": {"a": {"seed": 1}}}, "a sets seed"),
        ({"variants": {"a": {"projector": "x"}}}, "a sets projector"),
        ({"variants": {"a": {"against": "b"}}}, "`against: b`"),
        ({"variants": {"a": 3}}, "variant a"),
        ({"grid": {"lora_r": 8}}, "lora_r must have a list"),
        ({"finetune": [1]}, "the value of finetune must be a mapping"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        read_grid(grid_file(tmp_path, **changes))
    assert "grid.yaml" in refusal(error.value)


def test_stage_1_is_shared_and_nothing_is_done_twice(tmp_path: Path) -> None:
    grid, pretend = read_grid(grid_file(tmp_path)), Pretend()
    measured = run_grid(grid, tmp_path / "out", pretend)
    assert len(measured) == 8 and all(one.result == 0.5 and one.ci95 == (0.4, 0.6) for one in measured)
    # Three different stages 1 for four variants, for each seed.
    assert (pretend.count("pretrain_projector"), pretend.count("finetune_lora"), pretend.count("eval")) == (6, 8, 8)
    again = Pretend()
    assert run_grid(grid, tmp_path / "out", again) == measured and again.done == []
    more = run_grid(replace(grid, seeds=(1, 2, 3)), tmp_path / "out", again)
    assert len(more) == 12 and again.count("finetune_lora") == 4


@pytest.mark.parametrize("fail_at", range(0, 12, 3))
def test_an_interrupted_grid_goes_on_with_the_very_command_that_failed(tmp_path: Path, fail_at: int) -> None:
    grid, pretend = read_grid(grid_file(tmp_path, seeds=[1])), Pretend(fail_at)
    with pytest.raises(InputError, match="It fails"):
        run_grid(grid, tmp_path / "out", pretend)
    assert len(read_measured(grid, tmp_path / "out")) < 4
    assert len(run_grid(grid, tmp_path / "out", pretend)) == 4
    whole = Pretend()
    run_grid(grid, tmp_path / "whole", whole)
    assert [(what, path.replace("/whole/", "/out/")) for what, path in whole.done] == pretend.done


def test_a_cell_with_other_settings_is_not_taken_for_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_grid(read_grid(grid_file(tmp_path, seeds=[1])), out, Pretend())
    changed, pretend = read_grid(grid_file(tmp_path, seeds=[1], variants={"as it is": {"lora_r": 2}})), Pretend()
    with pytest.raises(InputError, match="other settings"):
        run_grid(changed, out, pretend)
    assert pretend.done == []


def test_each_checkpoint_is_measured_and_the_last_is_the_result(tmp_path: Path) -> None:
    grid = read_grid(grid_file(tmp_path, seeds=[1], variants={"a": {}}))
    (measured,) = run_grid(grid, tmp_path / "out", Pretend(checkpoints=(4, 12, 8)))
    assert [step for step, _ in measured.points] == [4, 8, 12]
    page = ablation_report.write(tmp_path / "out", grid, [measured]).read_text()
    assert "over optimizer steps" in page


def test_a_measure_without_an_accuracy_is_said(tmp_path: Path) -> None:
    pretend = Pretend()
    grid = read_grid(grid_file(tmp_path, seeds=[1]))
    with pytest.raises(InputError, match="returns no accuracy"):
        run_grid(grid, tmp_path / "out", lambda words, log: "{}" if words[0] == "eval" else pretend(words, log))
    assert not list(tmp_path.rglob("*.measured/*.json"))


def test_the_figures() -> None:
    variants = tuple(Variant(name, None, {}, "", against) for name, against in (("a", "a"), ("b|c", "a"), ("d", "b|c")))
    grid = Grid(variants, (1, 2, 3))
    shares = {"a": (0.90, 0.92, 0.94), "b|c": (0.80, 0.83, 0.86), "d": (0.5,)}
    measured = [
        Measured(name, seed, ((0, share),), (share - 0.02, share + 0.02))
        for name, found in shares.items()
        for seed, share in enumerate(found, 1)
    ]
    a, b, d = ablation_report.rows(grid, measured)
    low, high = stats.t.interval(0.95, 2, loc=0.83, scale=stats.sem(shares["b|c"]))
    assert b.right == pytest.approx(0.83) and b.ci95 == pytest.approx((low, high))
    gains = [y - x for x, y in zip(shares["a"], shares["b|c"], strict=True)]
    assert b.gain == pytest.approx(-0.09)
    assert b.gain_ci95 == pytest.approx(stats.t.interval(0.95, 2, loc=-0.09, scale=stats.sem(gains)))
    assert a.gain is None and a.gain_ci95 is None
    assert (d.seeds, d.ci95, d.gain_ci95) == (1, (0.48, 0.52), None) and d.gain == pytest.approx(-0.3)
    table = ablation_report.markdown([a, b, d])
    assert r"| b\|c | 3 | 83.0 % | 75.5 to 90.5 | a | -9.0 |" in table
    assert "| d | 1 | 50.0 % | 48.0 to 52.0 | b\\|c | -30.0 |  |" in table


def test_a_page_of_an_unfinished_grid_says_so(tmp_path: Path) -> None:
    grid = Grid((Variant("a", None, {}, "", "a"),), (1, 2))
    page = ablation_report.write(tmp_path, grid, [Measured("a", 1, ((0, 0.5),), (0.4, 0.6))]).read_text()
    assert "Unfinished cells (a variant with a seed): 1." in page and "<svg" in page
    (cell,) = json.loads((tmp_path / "cells.json").read_text())
    assert cell == {"variant": "a", "seed": 1, "points": [[0, 0.5]], "ci95": [0.4, 0.6]}
    assert "Unfinished cells (a variant with a seed): 2." in ablation_report.write(tmp_path, grid, []).read_text()


def in_process(words: Sequence[str], log: Path) -> str:
    """The recipes' own functions, and the command."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if words[0] == "eval":
            assert qllava(list(words)) == 0
        else:
            recipe = {"pretrain_projector": pretrain, "finetune_lora": finetune}[words[0]]
            recipe(parse(words[1:], output_dir="unused", nano={}))
    return said.getvalue()


def test_real_cells_from_end_to_end(tiny: Tiny, tmp_path: Path) -> None:
    """On the tiny parts, in this process."""
    common = {"train_file": str(tiny.rows), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    parts = {"language_model": str(tiny.language_model), "vision_tower": str(tiny.tower)}
    path = grid_file(
        tmp_path,
        seeds=[1],
        measure=f"vqa {{model}} {tiny.rows} --out {{out}}",
        pretrain={**common, "template": "chatml"},
        finetune={**common, **parts, "template": "chatml", "lora_r": 4, "lora_alpha": 8, "save_strategy": "no"},
        variants={
            "drawn projector": {"pretrain": {"max_steps": 1, "learning_rate": 0}},
            "with checkpoints": {"save_strategy": "steps", "save_steps": 1, "vision_feature_layer": -1},
        },
    )

    out = tmp_path / "out"
    plain, kept = run_grid(read_grid(path), out, in_process)
    assert [step for step, _ in plain.points] == [0] and [step for step, _ in kept.points] == [1, 2]
    assert (out / "with-checkpoints" / "seed-1.measured" / "checkpoint-2.jsonl").is_file()
    assert (out / "drawn-projector" / "seed-1" / "results.json").is_file()


def test_scienceqa_in_both_orders_from_end_to_end(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recipes/grids/scienceqa.yaml does it: examples in both orders, every checkpoint asked, accuracy over steps."""
    monkeypatch.setattr(scienceqa, "REASON_TOKENS", 16)
    problem = {"question": "A?", "choices": ["a", "b"], "answer": 1, "hint": "", "solution": "c", "image": None}
    problem |= {"subject": "social science", "grade": "grade3"}
    problems = {str(n): {**problem, "split": "test" if n < 2 else "train"} for n in range(6)}
    for number in ("1", "3"):
        problems[number]["image"] = "image.png"
        (tmp_path / str(problems[number]["split"]) / number).mkdir(parents=True)
        make_image("red").save(tmp_path / str(problems[number]["split"]) / number / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    write_records(tmp_path / "problems.json", tmp_path, "train", tmp_path / "rows")
    shipped = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "grids" / "scienceqa.yaml").read_text())
    settings = {key: shipped["finetune"][key] for key in ("image_folder", "max_length", "too_long", "save_strategy")}
    parts = {"language_model": str(tiny.language_model), "vision_tower": str(tiny.tower), "projector": str(tiny.stage1)}
    sizes = {"lora_r": 4, "lora_alpha": 8, "template": "chatml", "max_steps": 2, "save_steps": 1}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**shipped, "finetune": {**settings, **parts, **sizes}}))
    places = {"rows": tmp_path / "rows", "problems": tmp_path / "problems.json", "images": tmp_path}
    grid = read_grid(tmp_path / "grid.yaml", {name: path.absolute for name, path in places.items()})
    measured = run_grid(grid, tmp_path / "out", in_process)
    assert [[step for step, _ in one.points] for one in measured] == [[1, 2], [1, 2]]
    page = ablation_report.write(tmp_path / "out", grid, measured).read_text()
    assert "over optimizer steps" in page and "reason first" in page and "answer first" in page

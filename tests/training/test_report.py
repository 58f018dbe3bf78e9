"""qllava.training.report: a run's folder becomes one page, whatever is missing from it or damaged in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.training.outcome import duration
from qllava.training.report import read_metrics, smooth, write_report

RESULTS = {
    "frequent_answer": 0.312, "blind": 0.334, "untrained": 0.051, "stage1": 0.287, "stage2": 0.931,
    "unseen_pairs": 0.874, "by_type": {"form": 0.91, "colour": 0.98}, "n": 1960, "seconds": 512.3,
}  # fmt: skip


def record(stage: str, step: int, **values: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "total_steps": 40, **values}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished nano run."""
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    records = [record("pretrain", s, loss=3 - s / 20, grad_norm=1.0, learning_rate=1e-3) for s in range(1, 41)]
    records += [record("finetune", s, loss=2 - s / 30, eval_loss=1.5, eval_exact_match=0.5) for s in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    Image.new("RGB", (96, 96), "red").save(folder / "scene.png")
    samples = [
        {"image": "scene.png", "question": "What colour?", "truth": "red", "before": "<b>", "after": "Red."},
        {"image": "scene.png", "question": "How many?", "truth": "1", "before": "2", "after": "2"},
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "ledger.txt").write_text("projector  62,016  fp32\n")
    (folder / "run.yaml").write_text("model_name_or_path: nano\n")
    return folder


def test_a_whole_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    for expected in (
        "Run my_run", "93.1\u00a0%", "87.4\u00a0%", "1,960", "8 min 32 s",
        "Most frequent answer", "Blind", "Untrained", "After stage 1", "After stage 2", "Unseen pairs",
        "Stage 1: training the projector", "Stage 2: training projector and LoRA", "Exact match on", "Learning rate",
        "62,016", "model_name_or_path: nano", "<details>",
    ):  # fmt: skip
        assert expected in html, expected
    assert html.index(">colour<") < html.index(">form<"), "the best type comes first"
    assert html.count("data:image/png") == 1, "an image with two questions is shown once"
    assert html.count("\u2713") == 1 and html.count("\u2717") == 3
    assert "&lt;b&gt;" in html


def test_one_s_own_data_has_no_table_and_the_page_none_either(run: Path) -> None:
    (run / "results.json").unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "Most frequent answer" not in html and "Held-out answers</h2>" not in html
    assert "Stage 2" in html and 'class="callout' not in html


def test_own_data_begins_with_what_it_came_to(run: Path) -> None:
    (run / "adapter_config.json").write_text("{}")
    (run / "command.json").write_text(json.dumps({"command": "python x.py --lr 1", "versions": {"torch": "9.9"}}))
    results = {"eval_exact_match": 0.58, "n": 500, "ci95": [0.536, 0.622], "eval_loss": 1.25, "seconds": 432}
    html = write_report(run, {**results, "tokens_per_second": 1234.4}).read_text(encoding="utf-8")
    said = ("58.0% of 500 questions, exact match (95 % interval 53.6% to 62.2%)", "1.2500 per learned token",
            "7 min 12 s", "1,234 tokens/s", "python x.py --lr 1", "torch 9.9", f"qllava merge {run}")  # fmt: skip
    places = [html.index(text) for text in said]
    assert places == sorted(places) and places[-1] < html.index("Stage 2: training projector")
    assert "answers 58.0" in html


@pytest.mark.parametrize("gone", ["metrics.jsonl", "samples.json", "ledger.txt", "run.yaml", "scene.png"])
def test_any_file_may_be_absent(run: Path, gone: str) -> None:
    (run / gone).unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "After stage 2" in html
    assert ("scene.png cannot be opened" in html) == (gone == "scene.png")


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert "has no results yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_damage_is_said_and_not_raised(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "step": 4')
    (run / "results.json").write_text("{")
    (run / "scene.png").write_bytes(b"no image")
    html = write_report(run).read_text(encoding="utf-8")
    assert "1 corrupt line of metrics.jsonl was left out" in html
    assert "results.json cannot be read" in html
    assert "cannot be opened" in html


@pytest.mark.parametrize("share", [1.5, -0.2])
@pytest.mark.parametrize("n", [100, 0, -3, "many", None])
def test_results_that_cannot_be_have_no_interval(run: Path, share: float, n: object) -> None:
    results = RESULTS | {
        "stage2": share,
        "by_type": {"colour": share},
        "counts": {"stage2": n, "by_type": {"colour": n}},
    }
    (run / "results.json").write_text(json.dumps(results))
    html = write_report(run).read_text(encoding="utf-8")
    assert f"{100 * share:.1f}" in html and "n = " not in html


def test_every_result_has_its_interval_and_number(run: Path) -> None:
    results = RESULTS | {"stage2": 0.9, "counts": {"stage2": 1000}}
    (run / "results.json").write_text(json.dumps(results))
    assert "88.0 to 91.7\u00a0%, n = 1,000" in write_report(run).read_text(encoding="utf-8")


def test_an_interrupted_run_says_where_it_stands(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-10]) + "\n")
    assert "the last recorded step is 30 of 40" in write_report(run).read_text(encoding="utf-8")


def test_free_text_is_not_called_wrong(run: Path) -> None:
    truth = "A large red circle stands left of a small blue square."
    samples = [{"image": "scene.png", "question": "Describe.", "truth": truth, "before": "", "after": "A red circle."}]
    (run / "samples.json").write_text(json.dumps(samples))
    html = write_report(run).read_text(encoding="utf-8")
    assert "\u2717" not in html and "\u2713" not in html


def test_a_resumed_run_keeps_the_later_record_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [record("pretrain", 1, loss=3), record("pretrain", 2, loss=9), record("pretrain", 2, loss=2, eval_loss=1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    stages, damaged = read_metrics(path)
    assert damaged == 0
    assert [(r["step"], r["loss"]) for r in stages["pretrain"]] == [(1, 3), (2, 2)]
    assert stages["pretrain"][1]["eval_loss"] == 1


@pytest.mark.parametrize(
    ("counts", "said"),
    [((64, 64), "Exact match on 64 v"), ((64, 500), "on 64 (at the end 500) v"), ((64, 8), "on 64 (at the end 8) v")],
)
def test_the_curve_says_how_many_questions_it_counts(run: Path, counts: tuple[int, int], said: str) -> None:
    """Those of an evaluation, and those of the end, which may be fewer."""
    lines = [record("finetune", n, eval_exact_match=0.5, eval_exact_match_n=count) for n, count in enumerate(counts)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said in write_report(run).read_text(encoding="utf-8")


def test_smoothing_keeps_a_constant_and_skips_nan() -> None:
    assert [y for _, y in smooth([(float(x), 2.0) for x in range(50)])] == pytest.approx([2.0] * 50)
    assert [x for x, _ in smooth([(1, 1.0), (2, math.nan), (3, 1.0)])] == [1, 3]
    noisy = [(float(x), float(x % 2)) for x in range(300)]
    assert all(0.3 < y < 0.7 for _, y in smooth(noisy)[50:])


@pytest.mark.parametrize(("seconds", "text"), [(48.4, "48 s"), (432, "7 min 12 s"), (7500, "2 h 5 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_screen(run: Path, width: int, browser: Any) -> None:
    """In a real browser nothing is wider than the window, and every image is shown."""
    path = write_report(run)
    tab = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg')].map(s => 12 * s.getBoundingClientRect().width / 440))"
    )
    assert smallest >= 9, "the labels of a chart must be readable"
    assert complaints == []
    tab.close()

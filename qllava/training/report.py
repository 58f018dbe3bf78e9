"""The report of a run as one HTML page: results, loss curves, and answers before and after training.

It reads only what the run wrote, so that it can be created again for any folder at any time, also during the run:

    python -c "from pathlib import Path; from qllava.training.report import write_report; write_report(Path('runs/x'))"

| file | content in the report | left out if |
|---|---|---|
| `results.json` | headline figures, the levels from guessing to stage 2, accuracy by question type | own data |
| `metrics.jsonl` | loss, exact match, gradient norm and learning rate of each stage | nothing was logged yet |
| `spikes.jsonl` | marks on the loss, and a list of the samples of these steps | no loss jumped |
| `samples.json` | images with question, reference answer, and the answers before and after | no samples |
| `ledger.txt`, `run.yaml` | unchanged | missing |

A report is written after hours of training, so corrupt lines and missing images are reported in the
page and never raised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qllava import page
from qllava.data.images import open_image
from qllava.data.problems import RecordError
from qllava.evaluation.intervals import wilson
from qllava.evaluation.vqa import is_correct
from qllava.files import read_json
from qllava.page import Bar, Html, Series
from qllava.runs import LEDGER_FILE, METRICS_FILE, REPORT_FILE, RESULTS_FILE, RUN_FILE, SAMPLES_FILE, SPIKES_FILE
from qllava.training import outcome
from qllava.training.durable.numbers import shown

# The levels from guessing to the end: key of results.json, name, what it measures.
LADDER = (
    ("frequent_answer", "Most frequent answer", "the most frequent training answer to each question text"),
    ("blind", "Blind", "the trained model with the wrong image"),
    ("untrained", "Untrained", "the same parts before the first step"),
    ("stage1", "After stage 1", "only the projector is trained"),
    ("stage2", "After stage 2", "projector and LoRA are trained"),
    ("unseen_pairs", "Unseen pairs", "pairs of colour and form that no training image shows"),
)
BASELINES = ("frequent_answer", "blind", "untrained")
"""Levels that the results are compared with, drawn in grey."""
STAGES = {"pretrain": "Stage 1: training the projector", "finetune": "Stage 2: training projector and LoRA"}

_HELD_OUT = (
    "Held-out loss is measured on examples that the run does not learn from. If it rises while the training loss "
    "falls, the model memorizes its examples: train for fewer steps, or with more data."
)
# Reference answers with more words are free text, for which exact match would count good answers as wrong.
SHORT_ANSWER_WORDS = 4


def write_report(folder: Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        folder: Folder of the run.
        results: Content that will be written to `results.json`; by default its current content.

    Raises:
        OSError: The page cannot be written, for example on a full disk; an earlier page stays unchanged.
    """
    results = read_json(folder / RESULTS_FILE) if results is None else results
    stages, damaged = read_metrics(folder / METRICS_FILE)
    spikes, _ = read_metrics(folder / SPIKES_FILE)
    sections = [
        *_results_section(folder, results if isinstance(results, dict) else None),
        *(_stage_section(name, records, spikes.get(name, [])) for name, records in stages.items()),
        *_samples_section(folder, read_json(folder / SAMPLES_FILE)),
        *_files_section(folder),
    ]
    lines = "1 corrupt line" if damaged == 1 else f"{damaged} corrupt lines"
    notes = [f"{lines} of {METRICS_FILE} {'was' if damaged == 1 else 'were'} left out."] if damaged else []
    notes += [
        f"{name} cannot be read as JSON and was left out."
        for name in (RESULTS_FILE, SAMPLES_FILE)
        if (folder / name).exists() and read_json(folder / name) is None
    ]
    if not sections:
        notes.append(f"This run has no results yet: {METRICS_FILE}, {RESULTS_FILE} and {SAMPLES_FILE} are missing.")
    body = [*(page.callout(note, "warning") for note in notes), *sections]
    out = folder / REPORT_FILE
    page.write_page(
        out,
        page.page(
            f"Run {folder.resolve().name}", _lead(results), body, footer="Written by qllava from this folder's files."
        ),
    )
    return out


def read_metrics(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the records of `metrics.jsonl` by stage, in the order of steps, and the number of corrupt lines.

    A resumed run repeats the steps after its checkpoint: records of the same stage and step are merged, and the later
    value of each key wins. A missing file gives no stages.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    damaged = 0
    if not path.exists():
        return {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            stage, step = str(record["stage"]), int(record["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        stages.setdefault(stage, {}).setdefault(step, {}).update(record)
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in stages.items()}, damaged


def _lead(results: Any) -> str:
    if isinstance(results, dict) and _finite(results.get("eval_exact_match")) and "stage2" not in results:
        share = page.percent(results["eval_exact_match"])
        return f"The trained model answers {share} of {results.get('n', 0):,} held-out questions correctly."
    if isinstance(results, dict) and _finite(results.get("stage2")):
        return f"After both stages {page.percent(results['stage2'])} of the held-out answers are correct."
    return "What was trained, the loss during training, and sample answers before and after training."


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _results_section(folder: Path, results: Mapping[str, Any] | None) -> list[Html]:
    """Return the results of the run, headline figures and the two bar charts, from `results.json`."""
    if results is None:
        return []
    figures = page.table(["", ""], outcome.figures(folder, results))
    following = page.code("\n".join(outcome.next_commands(folder)), wrap=True)
    sections = [page.section("Result", figures, page.paragraph("Next steps:", muted=True), following)]
    counts = results.get("counts")
    ladder = [
        _bar(label, results[key], counts, key, note, faint=key in BASELINES)
        for key, label, note in LADDER
        if _finite(results.get(key))
    ]
    if ladder:
        tiles = [
            (label, page.percent(results[key]))
            for key, label in (("stage2", "After stage 2"), ("unseen_pairs", "Unseen pairs"), ("blind", "Blind"))
            if _finite(results.get(key))
        ]
        if _finite(results.get("n")):
            tiles.append(("Held-out questions", f"{results['n']:,}"))
        parts = [page.tiles(tiles)] if tiles else []
        sections.append(page.section("Held-out answers", *parts, page.bar_chart(ladder)))
    by_type = results.get("by_type")
    if isinstance(by_type, dict):
        numbers = counts.get("by_type") if isinstance(counts, dict) else None
        bars = [_bar(str(name), value, numbers, str(name)) for name, value in by_type.items() if _finite(value)]
        if bars:
            bars.sort(key=lambda bar: -bar.value)
            remark = page.paragraph("Accuracy after stage 2 by type of question, best type first.", muted=True)
            sections.append(page.section("By type of question", remark, page.bar_chart(bars)))
    return sections


def _bar(label: str, share: float, counts: Any, key: str, note: str = "", *, faint: bool = False) -> Bar:
    """Return the bar of an accuracy, with its interval and number of questions where `counts` has them."""
    n = counts.get(key) if isinstance(counts, dict) else None
    if not isinstance(n, int) or n <= 0 or not 0 <= share <= 1:
        return Bar(label, share, note, faint=faint)
    return Bar(label, share, note, wilson(round(share * n), n), n, faint)


def _stage_section(name: str, records: Sequence[Mapping[str, Any]], spikes: Sequence[Mapping[str, Any]]) -> Html:
    """Return the curves of one stage, and the steps whose loss jumped."""
    loss = _points(records, "loss")
    lines = [Series("training, each record", loss, faint=True), Series("training, smoothed", smooth(loss))]
    if len(loss) <= 20:
        lines = [Series("training", loss)]
    held_out = _points(records, "eval_loss")
    lines += [Series("held-out", held_out)] if held_out else []
    jumps = _points(spikes, "loss")
    lines += [Series("jumps", jumps, marks=True)] if jumps else []
    charts = [page.line_chart("Loss", lines)]
    exact = _points(records, "eval_exact_match")
    if exact:
        charts.append(page.line_chart(_exact_title(records), [Series("exact match", exact)], share=True))
    further = [
        page.line_chart(title, [Series(title, points)], log=log)
        for key, title, log in (("grad_norm", "Gradient norm", True), ("learning_rate", "Learning rate", False))
        if (points := _points(records, key))
    ]
    last, total = records[-1].get("step"), records[-1].get("total_steps")
    parts = [page.grid(*charts)]
    if held_out:
        parts.append(page.paragraph(_HELD_OUT, muted=True))
    if isinstance(total, int) and isinstance(last, int) and last < total:
        parts.insert(
            0, page.callout(f"This stage is not finished: the last recorded step is {last} of {total}.", "warning")
        )
    if jumps:
        parts.append(page.details(f"Steps whose loss jumped: {len(jumps):,}", _spikes_table(spikes)))
    if further:
        parts.append(page.details("Gradient norm and learning rate", page.grid(*further)))
    return page.section(STAGES.get(name, f"Stage {name}"), *parts)


def _exact_title(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the title of the exact-match curve, which counts other questions than the final table."""
    counts = [int(record["eval_exact_match_n"]) for record in records if "eval_exact_match_n" in record]
    if not counts:
        return "Exact match on held-out questions during the run"
    first, last = counts[0], counts[-1]
    count = f"{first:,}" if first == last else f"{first:,} (at the end {last:,})"
    return f"Exact match on {count} validation questions during the run"


def _spikes_table(spikes: Sequence[Mapping[str, Any]], most: int = 50) -> Html:
    """Return a table of the steps with a loss spike, and the samples of these steps."""
    rows = []
    for spike in spikes[:most]:
        loss, usual, ids = spike.get("loss"), spike.get("usual"), spike.get("ids")
        names = shown([str(name) for name in ids]) if isinstance(ids, list) else ""
        rows.append([f"{spike['step']:,}", *(f"{v:.3g}" if _finite(v) else "" for v in (loss, usual)), names])
    return page.table(["Step", "Loss", "Usual loss", "Samples"], rows)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of each record that has the value; the chart leaves out values that are not finite."""
    return [
        (float(record["step"]), float(record[key])) for record in records if isinstance(record.get(key), int | float)
    ]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return an exponential moving average without the usual bias towards its first value.

    Each point is the weighted mean of the values so far, with weights that decrease with the distance: the curve starts
    at the first value and follows at once. The window is about a thirtieth of the run, at most 25 records, so that the
    curve of a short run does not lag. Values that are not finite are skipped.
    """
    weight = 1 - 1 / min(max(len(points) / 30, 2.0), 25.0)
    out, total, norm = [], 0.0, 0.0
    for x, y in points:
        if not math.isfinite(y):
            continue
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        out.append((x, total / norm))
    return out


def _samples_section(folder: Path, samples: Any) -> list[Html]:
    """Return the sample images, each once, with its questions and the answers before and after."""
    if not isinstance(samples, list):
        return []
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if isinstance(sample, dict):
            by_image.setdefault(str(sample.get("image") or ""), []).append(sample)
    if not by_image:
        return []
    cards = [page.card(_image(folder, name), *map(_answers, group)) for name, group in by_image.items()]
    remark = page.paragraph("Held-out images with the model's answers before and after training.", muted=True)
    return [page.section("Sample answers", remark, page.gallery(cards))]


def _image(folder: Path, name: str) -> Html:
    """Return the image of a sample; a relative path is tried in the run's folder first, then in the working folder."""
    if not name:
        return page.paragraph("No image: the question is text only.", muted=True)
    inside = folder / name
    try:
        return page.image(open_image(inside if inside.exists() else Path(name)), Path(name).name)
    except RecordError:
        return page.paragraph(f"The image {name} cannot be opened.", muted=True)


def _answers(sample: Mapping[str, Any]) -> Html:
    truth = str(sample.get("truth", ""))
    lines: list[tuple[str, str, bool | None]] = [("Reference answer", truth, None)]
    for key, label in (("before", "Before"), ("after", "After")):
        if sample.get(key) is not None:
            answer = str(sample[key])
            lines.append((label, answer, _verdict(answer, truth)))
    return page.group(page.paragraph(str(sample.get("question", ""))), page.verdicts(lines))


def _verdict(answer: str, truth: str) -> bool | None:
    """Return whether an answer is correct by the score; None if the reference is free text that it does not match."""
    if is_correct(answer, truth):
        return True
    return False if len(truth.split()) <= SHORT_ANSWER_WORDS else None


def _files_section(folder: Path) -> list[Html]:
    """Return the parameter ledger and the resolved configuration, unchanged."""
    parts = []
    ledger, configuration = folder / LEDGER_FILE, folder / RUN_FILE
    if ledger.exists():
        parts.append(page.code(ledger.read_text(encoding="utf-8").rstrip()))
    if configuration.exists():
        text = configuration.read_text(encoding="utf-8").rstrip()
        parts.append(page.details(f"The resolved configuration ({RUN_FILE})", page.code(text)))
    return [page.section("What was trained", *parts)] if parts else []

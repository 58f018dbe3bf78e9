"""Test of the paper's claim at small scale: examples from captions and boxes teach more than captions alone.

    python benchmarks/rules_vs_naive.py --run runs/finetune_lora --out benchmarks/results/rules_vs_naive.json

nano is tuned on the images of its training set, with the projector that the finished run `--run` aligned, by
recipes/finetune_lora.py with its defaults for nano's own examples; only the texts differ:

    main      nano's own questions: the score of the finished run, which saw further images (unnamed colours, no scene)
    rules     conversations with brief answers of `qllava.synthesis.rules.examples`: up to ten questions per image
    naive     a question from a list, and a caption

Each is scored on nano's 1,000 held-out questions. Seeds change the examples and the order of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import provenance
from qllava.nano.dataset import TRAIN_IMAGES, NanoData, prepare
from qllava.runs import RESULTS_FILE, STAGE1
from qllava.surroundings import prepare_process
from qllava.synthesis.rules.examples import write
from qllava.synthesis.sources import contexts_of
from qllava.training.options.defaults import NANO_EXAMPLES

ROOT = Path(__file__).parents[1]
TYPES = {"rules": "conversation", "naive": "naive"}


def make(kind: str, seed: int, images: int, folder: Path) -> Path:
    """Write the examples of a system, and return the path of their file."""
    contexts = contexts_of(f"nano:{images}")
    records = [record for one in contexts for record in write(one, (TYPES[kind],), seed=seed, brief=True)]
    path = folder / f"{kind}-{seed}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def tune(records: Path, run: Path, projector: Path, images: Path, seed: int) -> float:
    """Train stage 2 on these examples, unless it is finished already, and return its seconds."""
    results = run / RESULTS_FILE
    if not results.is_file():
        data = ["--train_file", records, "--image_folder", images, "--projector", projector]
        line = [sys.executable, ROOT / "recipes/finetune_lora.py", *data, "--output_dir", run, "--seed", seed]
        line += [word for name, value in NANO_EXAMPLES.items() for word in (f"--{name}", value)]
        subprocess.run([str(word) for word in line], check=True, cwd=ROOT)
    return float(json.loads(results.read_text(encoding="utf-8"))["seconds"])


def score(run: Path, data: NanoData, questions: Path) -> dict[str, Any]:
    """Return the figures that `qllava eval vqa --json` prints for a run."""
    line = [sys.executable, "-m", "qllava", "eval", "vqa", str(run), str(questions)]
    line += ["--image-folder", str(data.folder), "--json"]
    out: dict[str, Any] = json.loads(subprocess.run(line, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)
    return out


def measure(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write the examples of one run, train it, and return both scores."""
    data = prepare()
    options.folder.mkdir(parents=True, exist_ok=True)
    records = make(kind, seed, options.images, options.folder)
    run = options.folder / f"run-{kind}-{seed}"
    seconds = tune(records, run, options.run / STAGE1, data.folder, seed)
    test, unseen = (score(run, data, questions) for questions in (data.test, data.unseen))
    shown = {key: test[key] for key in ("accuracy", "ci95", "by_type", "n")}
    return {"seed": seed, **shown, "unseen_pairs": unseen["accuracy"], "seconds": seconds}


def summary(main: float, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the mean accuracies over the seeds, and their differences in percentage points."""
    means = {kind: statistics.mean(one["accuracy"] for one in done) for kind, done in runs.items() if done}
    out: dict[str, Any] = {"main": main, **means}
    if "rules" in means:
        out["points_below_main"] = 100 * (main - means["rules"])
    if len(means) == 2:
        out["points_above_naive"] = 100 * (means["rules"] - means["naive"])
    return out


def main() -> None:
    """Run every system with every seed, and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of recipes/finetune_lora.py on nano")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/rules_vs_naive"), help="folder for examples and runs, which are kept"
    )
    parser.add_argument("--images", type=int, default=TRAIN_IMAGES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.run, options.folder = options.run.resolve(), options.folder.resolve()
    own = json.loads((options.run / RESULTS_FILE).read_text(encoding="utf-8"))
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TYPES}
    started = time.monotonic()
    for seed in range(options.seeds):
        for kind in TYPES:
            runs[kind].append(measure(kind, seed, options))
            result = {
                **provenance("cpu"),
                "images": options.images,
                "seconds": round(time.monotonic() - started),
                "summary": summary(own["stage2"], runs),
                "main": {key: own[key] for key in ("stage2", "by_type", "unseen_pairs", "n")},
                **runs,
            }
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(json.dumps(result["summary"]), flush=True)


if __name__ == "__main__":
    prepare_process()
    main()

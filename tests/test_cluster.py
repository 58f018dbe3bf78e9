"""Files for clusters, run with stand-ins for the clusters' programs: what they start, and when they start it again."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from qllava import cli
from qllava.config import DataConfig, ModelConfig
from qllava.training import run
from qllava.training.settings import Settings, TrainConfig
from recipes.cluster import ray_train
from tests.test_recipes import ROOT, commands, fenced, understand

SLURM = ROOT / "recipes" / "cluster" / "slurm.sh"
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")

# As SLURM's: as many tasks as asked for, each with its number; the highest status of a task is srun's own.
SRUN = """#!/bin/bash
echo "$@" >> srun.log
while [ "$1" != bash ]; do shift; done
status=0
for number in $(seq 0 $((${SLURM_NTASKS:-1} - 1))); do
  SLURM_PROCID=$number SLURM_LOCALID=$number "$@" || { got=$?; [ $got -gt $status ] && status=$got; }
done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.log
[ "$1 $2" = "show hostnames" ] && printf 'node7\\nnode8\\n'
exit 0
"""
# Stands for a recipe: says how it was started, and ends as a recipe would.
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RECIPE = f"""
import json, os, sys
with open("started.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in {TOLD}}}]) + "\\n")
sys.exit(int(os.environ["STATUS"]))
"""


def submit(folder: Path, recipe: str, *words: str, status: int = 0, **environment: str) -> tuple[int, str, str]:
    """Run the script in a folder as SLURM would; its status, what it asked of scontrol, and what it said."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "recipe.py").write_text(recipe)
    given = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "RECIPE": "recipe.py"}
    given |= {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1",
        "STATUS": str(status),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    # From a copy elsewhere: SLURM runs one in its spool folder.
    copy = shutil.copy(SLURM, folder / "bin" / "slurm_script")
    line, environ = ["bash", copy, *words], {**os.environ, **given, **environment}
    done = subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    asked = folder / "scontrol.log"
    return done.returncode, asked.read_text() if asked.exists() else "", done.stdout + done.stderr


def started(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "started.jsonl").read_text().splitlines()]


class TestSlurm:
    @pytest.mark.parametrize("status", [0, 1, 2, 130, 137, 143])
    def test_other_ends_are_the_jobs_own(self, tmp_path: Path, status: int) -> None:
        assert submit(tmp_path, RECIPE, status=status) == (status, "", "")

    def test_a_run_that_was_saved_goes_back_into_the_queue(self, tmp_path: Path) -> None:
        status, asked, said = submit(tmp_path, RECIPE, status=75)
        assert (status, asked) == (75, "requeue 4711\n") and "goes back into the queue" in said

    def test_a_real_recipe_that_gets_the_signal(self, tmp_path: Path) -> None:
        """The status is the recipe's own, not the stand-in's."""
        ends = (
            "import os, signal, sys\nfrom qllava.training.main import main\n"
            "sys.exit(main(lambda settings: os.kill(os.getpid(), signal.SIGUSR1), lambda: None))\n"
        )
        status, asked, said = submit(tmp_path, ends)
        assert (status, asked) == (
            75,
            "requeue 4711\n",
        ) and "stopped by SIGUSR1; run the same command to resume" in said

    def test_the_shell_outlives_the_signal(self, tmp_path: Path) -> None:
        """Some clusters are set up to signal the batch shell too."""
        ends = "import os, signal, sys\nos.kill(int(os.environ['SHELL_PID']), signal.SIGUSR1)\nsys.exit(75)\n"
        script = SLURM.read_text().replace("srun --kill", "export SHELL_PID=$$\nsrun --kill", 1)
        with pytest.MonkeyPatch.context() as patch:
            (tmp_path / "slurm.sh").write_text(script)
            patch.setattr(sys.modules[__name__], "SLURM", tmp_path / "slurm.sh")
            assert submit(tmp_path, ends)[:2] == (75, "requeue 4711\n")

    def test_words_arrive_as_they_were_given(self, tmp_path: Path) -> None:
        words = ["--train_file", "my rows.json", "--x", "$HOME `id` 'a' \"b\" *"]
        submit(tmp_path, RECIPE, *words)
        ((arrived, environment),) = started(tmp_path)
        assert arrived == words
        assert all(environment[name] == os.environ.get(name) for name in TOLD), "one process is no group"

    def test_several_tasks_find_each_other(self, tmp_path: Path) -> None:
        given = {"SLURM_NTASKS": "3", "SLURM_JOB_NODELIST": "node[7-8]"}
        status, asked, _ = submit(tmp_path, RECIPE, "--a b", status=75, **given)
        found = started(tmp_path)
        assert [one["RANK"] for _, one in found] == [one["LOCAL_RANK"] for _, one in found] == ["0", "1", "2"]
        assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for _, one in found} == {
            ("3", "node7", "24711")
        }
        assert all(words == ["--a b"] for words, _ in found)
        assert (status, asked.splitlines()) == (75, ["show hostnames node[7-8]", "requeue 4711"])

    def test_tasks_that_still_save_are_let_alone(self, tmp_path: Path) -> None:
        submit(tmp_path, RECIPE)
        assert (tmp_path / "srun.log").read_text().startswith("--kill-on-bad-exit=0 --wait=120 ")

    def test_what_is_asked_of_slurm(self) -> None:
        asked = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.M)
        assert dict(asked) | {"--signal": "USR1@120", "--requeue": "", "--open-mode": "append"} == dict(asked)
        lines = SLURM.read_text().splitlines()
        first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
        assert not any(line.startswith("#SBATCH") for line in lines[first:]), "SLURM reads no further"

    def test_shellcheck_finds_nothing(self) -> None:
        program = shutil.which("shellcheck")
        if program is None:
            pytest.skip("shellcheck is not installed")
        done = subprocess.run([program, str(SLURM)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    def test_what_the_page_submits_is_understood(self, tmp_path: Path) -> None:
        text = fenced(PAGE) + SLURM.read_text().replace("#   sbatch", "sbatch")
        lines = re.findall(r"^sbatch .*recipes/cluster/slurm\.sh (--config .*)$", text, re.M)
        assert len(lines) >= 3
        for words in lines:
            if not words.endswith("..."):
                assert isinstance(understand(f"python recipes/finetune_lora.py {words}", tmp_path), Settings)


def test_skypilot(tmp_path: Path) -> None:
    """Only keys that SkyPilot knows, and a command that the recipe knows, writing into the bucket."""
    given = yaml.safe_load((ROOT / "recipes" / "cluster" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert given.keys() == {"name", "workdir", "resources", "file_mounts", "setup", "run"}
    assert given["resources"]["use_spot"] is True and given["setup"] == "make env"
    assert given["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 143]}
    (command,) = commands(given["run"].replace(".venv/bin/python", "python"))
    settings = understand(command, tmp_path)
    assert isinstance(settings, Settings) and not settings.model.is_nano
    mounts = {place: mount["mode"] for place, mount in given["file_mounts"].items()}
    assert mounts[str(Path(str(settings.train.output_dir)).parent)] == "MOUNT_CACHED"
    assert mounts[str(Path(str(settings.data.train_file)).parent)] == "COPY"


class FakeRay:
    """`ray.train` as far as the file uses it: `fit` runs the function once for each worker."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.options: dict[str, Any] = {}
        fake = self

        class TorchTrainer:
            def __init__(self, train_loop_per_worker: Any, **options: Any) -> None:
                self.work, fake.options = train_loop_per_worker, options

            def fit(self) -> None:
                for _ in range(fake.options["scaling_config"]["num_workers"]):
                    self.work(fake.options["train_loop_config"])

        ray, train, torch = (types.ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
        for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
            setattr(train, name, dict)
        torch.TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
        for module in (ray, train, torch):
            patch.setitem(sys.modules, module.__name__, module)


class TestRay:
    def test_each_worker_runs_the_recipe_with_its_words(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        ray, seen = FakeRay(monkeypatch), []
        monkeypatch.setattr(run, "finetune", seen.append)
        ray_train.launch(["--workers", "2", "--shared", str(tmp_path), "--lora_r", "8", "--output_dir", "runs/x"])
        assert [(s.model.lora_r, s.train.output_dir) for s in seen] == [(8, "runs/x")] * 2
        assert ray.options["scaling_config"] == {"num_workers": 2, "use_gpu": True}
        assert ray.options["run_config"]["storage_path"] == str(tmp_path)
        assert ray.options["run_config"]["failure_config"] == {"max_failures": 3}

    def test_a_recipe_that_fails_is_a_failure_to_ray(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        FakeRay(monkeypatch)
        with pytest.raises(RuntimeError, match="ended with status 1"):
            ray_train.launch(["--cpu", "--config", "nowhere.yaml"])
        assert "nowhere.yaml does not exist" in capsys.readouterr().err

    def test_its_flags_are_not_the_recipes(self) -> None:
        own = {word for action in ray_train.command_line()._actions for word in action.option_strings}
        fields = {
            f"--{one.name}" for part in (ModelConfig, DataConfig, TrainConfig) for one in dataclasses.fields(part)
        }
        assert not own & fields and "--workers" in own

    def test_the_page_and_the_file_show_commands_that_are_understood(self, tmp_path: Path) -> None:
        texts = [PAGE, (ray_train.__doc__ or "").replace("\\\n", " ")]
        lines = [line for text in texts for line in re.findall(r"ray_train\.py (--workers .*)", text)]
        assert len(lines) == 2
        for line in lines:
            _, words = ray_train.command_line().parse_known_args(shlex.split(line))
            assert isinstance(understand(f"python recipes/finetune_lora.py {shlex.join(words)}", tmp_path), Settings)


def qllava(command: str) -> None:
    """A command of the page, done here."""
    program, *words = shlex.split(command)
    assert program == "qllava" and cli.main(words) == 0, command


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """A folder with what is known of a few images, and the images."""
    (tmp_path / "photos").mkdir()
    with (tmp_path / "contexts.jsonl").open("w") as file:
        for number in range(12):
            Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
            box = {"category": "dog", "bbox": [0.1, 0.1, 0.4, 0.4]}
            row = {"id": str(number), "image": f"{number}.png", "captions": [f"A dog and {number} trees."]}
            file.write(json.dumps({**row, "boxes": [box]}) + "\n")
    return tmp_path


def test_parts_that_are_written_and_checked_apart_are_the_whole(
    contexts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own commands, with 3 in the place of 8: each part once, and the last check finds them done."""
    monkeypatch.chdir(contexts)
    write, check = re.findall(r"^sbatch --array=1-8 --wrap '(?:QLLAVA_CACHE=cache )?(qllava .*)'$", PAGE, re.M)
    (together,) = re.findall(r"^QLLAVA_CACHE=cache (qllava check .*)$", PAGE, re.M)
    together = together.replace("part-{1..8}.jsonl", "part-1.jsonl part-2.jsonl part-3.jsonl") + " --json"
    monkeypatch.setenv("QLLAVA_CACHE", "cache")
    for number in "123":
        qllava(write.replace("/8", "/3").replace("$SLURM_ARRAY_TASK_ID", number))
        qllava(check.replace("$SLURM_ARRAY_TASK_ID", number))
    qllava(write.replace("$SLURM_ARRAY_TASK_ID/8", "1/1").replace("$SLURM_ARRAY_TASK_ID", "whole"))
    parts = [(contexts / f"part-{number}.jsonl").read_text().splitlines() for number in "123"]
    whole = (contexts / "part-whole.jsonl").read_text().splitlines()
    assert all(parts) and sorted(line for part in parts for line in part) == sorted(whole)

    (contexts / "held_out.json").write_text(json.dumps([{"question": "A cat?", "answer": "no"}]))
    tables = set((contexts / "cache").rglob("samples.arrow"))
    capsys.readouterr()
    qllava(together)
    found = json.loads(capsys.readouterr().out)
    assert len(tables) == 3 and len(set((contexts / "cache").rglob("samples.arrow")) - tables) == 1  # the held-out one
    monkeypatch.setenv("QLLAVA_CACHE", "other")
    qllava(together)
    assert json.loads(capsys.readouterr().out) == found

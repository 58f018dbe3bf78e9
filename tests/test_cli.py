"""The command line: instant, honest about its exit status, and one JSON object on stdout when asked for it."""

from __future__ import annotations

import inspect
import json
import pkgutil
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import qllava
from qllava import cli, doctor
from qllava.config import NANO_IDENTITY, InputError
from qllava.doctor import Check
from qllava.evaluation.intervals import Share
from qllava.evaluation.vqa import VqaResult
from qllava.merge import MergeResult
from qllava.runs import ADAPTER_CONFIG_FILE, ADAPTER_FILE, RECORD_FILE, RESULTS_FILE, RUN_FILE
from tests.tiny_runs import Tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def named(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command lines below name is there: it is looked at before a verb begins."""
    folder = tmp_path_factory.mktemp("named")
    for name in ("run", "pics"):
        (folder / name).mkdir()
    for name in ("q.jsonl", "p.json", "a.png", "b.png", "c.png"):
        (folder / name).touch()
    (folder / "runs" / "nano").mkdir(parents=True)
    run = {RUN_FILE: "model_name_or_path: nano", RESULTS_FILE: "{}", ADAPTER_FILE: "", ADAPTER_CONFIG_FILE: "{}"}
    run[RECORD_FILE] = json.dumps({"fingerprint": f"0-0-{NANO_IDENTITY}"})
    for name, content in run.items():
        (folder / "runs" / "nano" / name).write_text(content)
    monkeypatch.chdir(folder)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> list[Any]:
    """Put a function in the place of the one that does the work, whose arguments it takes; returns the calls."""
    calls: list[Any] = []
    signature = inspect.signature(pkgutil.resolve_name(name))

    def recorded(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(name, recorded)
    return calls


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, qllava.cli\n"
        "try: qllava.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'PIL', 'numpy', 'gradio', 'datasets'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    done = python("-c", code)
    assert "HEAVY []" in done.stderr
    for verb in ("doctor", "merge", "chat", "eval"):
        assert verb in done.stdout
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-m", "qllava", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Of the processor: what a user waits for where no other program runs.
    assert min(times) < 0.3


def test_import_of_the_package_is_instant_and_offers_load() -> None:
    done = python("-c", "import sys, qllava; print(callable(qllava.load), 'torch' in sys.modules, qllava.__version__)")
    assert done.stdout.split() == ["True", "False", qllava.__version__]


def test_python_m_qllava_passes_the_status_on() -> None:
    assert python("-m", "qllava", "--version").stdout == f"qllava {qllava.__version__}\n"
    assert python("-m", "qllava").returncode == 2


@pytest.mark.parametrize(
    "line",
    [
        "", "sing", "merge", "merge run", "merge run out --base nf5", "merge run out --dtype int8", "chat",
        "chat m --max-new-tokens 0", "chat m --max-new-tokens many", "chat m --temperature -1",
        "chat m --temperature nan", "eval", "eval vqa", "eval vqa model", "eval poetry m d", "doctor --loud",
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage:" in captured.err


def test_merge_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "qllava.merge.merge", lambda *a, **k: MergeResult("nf4", 1.7e-5, 0.999, 0.97, True))
    assert cli.main(["merge", "run", "out"]) == 0
    assert calls[0] == (
        (Path("run"), Path("out")),
        {"base": "nf4", "dtype": "bfloat16", "max_shard_size": "5GB", "verify": True, "base_model": []},
    )
    said = capsys.readouterr().out
    assert "verified" in said and "1.70e-05" in said and "99.90 %" in said and "97.0 %" in said
    line = "merge run out --base original --dtype float32 --max-shard-size 1GB --no-verify"
    assert cli.main(line.split()) == 0
    assert calls[1][1] == {
        "base": "original",
        "dtype": "float32",
        "max_shard_size": "1GB",
        "verify": False,
        "base_model": [],
    }


def test_merge_json_is_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(*args: Any, **kwargs: Any) -> MergeResult:
        print("a library says something")
        return MergeResult("nf4", 1.7e-5, 0.999, 0.97, True)

    stand_in(monkeypatch, "qllava.merge.merge", noisy)
    assert cli.main(["merge", "run", "out", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "base": "nf4",
        "kl_per_token": 1.7e-5,
        "top1_agreement": 0.999,
        "same_text": 0.97,
        "verified": True,
    }
    assert "a library says something" in captured.err


def test_a_true_merge_prints_what_it_found(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands in: the command merges, reads the result again, and prints the result's own figures."""
    kept: list[MergeResult] = []
    merge = qllava.merge.merge
    monkeypatch.setattr("qllava.merge.merge", lambda *a, **k: kept.append(merge(*a, **k)) or kept[-1])
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tiny.stage2), str(out), "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == asdict(kept[0]) and found["verified"] and found["kl_per_token"] < 1e-3
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_merge_that_does_not_verify_ends_with_1(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*a: object, **k: object) -> None:
        raise InputError("The merged model differs from what was trained.")

    stand_in(monkeypatch, "qllava.merge.merge", refuse)
    assert cli.main(["merge", "run", "out", *flags]) == 1
    captured = capsys.readouterr()
    assert "differs" in captured.err
    assert captured.out == ""


def test_a_merge_that_was_not_to_be_verified_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "qllava.merge.merge", lambda *a, **k: MergeResult("nf4", None, None, None, False))
    assert cli.main(["merge", "run", "out", "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_a_merge_onto_the_original_weights_is_not_called_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "qllava.merge.merge", lambda *a, **k: MergeResult("original", 0.2, 0.9, 0.8, False))
    assert cli.main(["merge", "run", "out", "--base", "original"]) == 0
    said = capsys.readouterr().out
    assert "verified" not in said
    assert "original weights" in said


def test_chat_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from qllava.inference import Loading, Settings

    calls = stand_in(monkeypatch, "qllava.cli.terminal.chat_loop", lambda *a, **k: 0)
    compared = stand_in(monkeypatch, "qllava.cli.terminal.compare_loop", lambda *a, **k: 0)
    assert cli.main(["chat", "nano"]) == 0
    settings = Settings(None, None, 256, None)
    assert calls[0] == (("nano", Loading()), {"images": [], "prompt": None, "settings": settings})
    line = (
        "chat m --image a.png b.png --image c.png --prompt Why? --load-in-4bit --max-new-tokens 5 --temperature 0.2 "
        "--seed 3 --system Brief --dtype bfloat16 --sampling recommended"
    )
    assert cli.main(line.split()) == 0
    assert calls[1] == (
        ("m", Loading(load_in_4bit=True, dtype="bfloat16", recommended_sampling=True)),
        {
            "images": [Path("a.png"), Path("b.png"), Path("c.png")],
            "prompt": "Why?",
            "settings": Settings("Brief", 0.2, 5, 3),
        },
    )
    assert cli.main(["chat", "m", "--compare", "n", "--votes", "v.jsonl"]) == 0
    assert compared[0][0] == (("m", "n"), Loading()) and compared[0][1]["votes"] == Path("v.jsonl")
    assert cli.main(["chat", "m", "--compare", "n", "--prompt", "Why?"]) == 1
    assert "cannot be used with --prompt" in capsys.readouterr().err


def test_eval_vqa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    types = {"form": Share(2, 4), "colour": Share(4, 4)}
    scored = VqaResult(0.75, 8, 6, ci95=(0.41, 0.93), types=types, answers=("",) * 8)
    result: dict[str, Any] = scored.to_json()
    calls = stand_in(monkeypatch, "qllava.evaluation.vqa.evaluate_file", lambda *a, **k: result)
    assert cli.main(["eval", "vqa", "nano", "q.jsonl", "--image-folder", "pics", "--out", "a.jsonl"]) == 0
    given = {"image_folder": Path("pics"), "out": Path("a.jsonl"), "html": None, "base_model": []}
    assert calls[0] == (
        ("nano", Path("q.jsonl")),
        {**given, "shots": 0, "pool": None, "choose": "random", "seed": 0, "read": None, "batch_size": None},
    )
    said = capsys.readouterr().out
    assert "Accuracy: 75.0 %, 6 of 8" in said and "41.0 to 93.0 %" in said
    assert said.index("colour") < said.index("form") and "50.0 %  (15.0 to 85.0 %)" in said
    assert cli.main(["eval", "vqa", "nano", "q.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    result["unread"] = 3
    line = "eval vqa nano q.jsonl --shots 2 --pool p.json --choose picture --seed 3 --html f.html --read (x)"
    line += " --batch-size 4"
    assert cli.main(line.split()) == 0
    assert calls[2][1] == {
        "image_folder": None,
        "out": None,
        "html": Path("f.html"),
        "shots": 2,
        "pool": Path("p.json"),
        "choose": "picture",
        "seed": 3,
        "read": "(x)",
        "batch_size": 4,
        "base_model": [],
    }
    assert "3 answers did not match --read and count as wrong" in capsys.readouterr().out
    for half in ("--shots 2", "--pool p.json"):
        assert cli.main(f"eval vqa nano q.jsonl {half}".split()) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_input_is_one_sentence_and_status_1(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InputError("q.jsonl, line 3, id 7: expected an answer, found none; add one")

    stand_in(monkeypatch, "qllava.evaluation.vqa.evaluate_file", refuse)
    assert cli.main(["eval", "vqa", "nano", "q.jsonl", *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "qllava: q.jsonl, line 3, id 7: expected an answer, found none; add one\n"


def test_an_interruption_is_no_stack_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("qllava.cli.terminal.chat_loop", interrupt)
    assert cli.main(["chat", "nano"]) == 130
    assert "interrupted" in capsys.readouterr().err


class TestDoctor:
    """`qllava doctor`."""

    def test_this_machine(self, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["doctor", "--json"])
        report = json.loads(capsys.readouterr().out)
        checks = {check["name"]: check for check in report["checks"]}
        assert {"Python", "torch", "trl", "device", "bf16", "NF4", "nano", "disk", "chromium"} <= set(checks)
        for name in ("Python", "torch", "transformers", "trl", "peft", "bitsandbytes", "NF4"):
            assert checks[name]["status"] == "ok", checks[name]
        assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")

    @pytest.mark.parametrize(("worst", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
    def test_status_and_lines(
        self, worst: Any, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = [Check("Python", "ok", "3.12"), Check("disk", worst, "1 GB", "make room")]
        monkeypatch.setattr(doctor, "examine", lambda: found)
        assert cli.main(["doctor"]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["ok", "Python", "3.12"]
        assert lines[1].startswith(worst) and lines[1].endswith("make room")

    def test_a_check_that_crashes_is_a_finding(self) -> None:
        def crash() -> Check:
            raise RuntimeError("CUDA driver\nis broken")

        check = doctor._guarded("device", crash)
        assert (check.status, check.detail) == ("fail", "RuntimeError: CUDA driver")

    def test_versions_are_held_against_the_bounds(self) -> None:
        bounds = doctor._bounds(["trl>=1.16,<1.17", "pytest>=8; extra == 'dev'"])
        assert set(bounds) == {"trl"}
        assert doctor._package("trl", bounds).status == "ok"
        old = doctor._package("trl", {"trl": "<1.0"})
        assert old.status == "warn" and "<1.0" in old.detail
        assert doctor._package("no-such-package-here", bounds).status == "fail"

    def test_a_wrong_nf4_layer_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import bitsandbytes as bnb

        forward = bnb.nn.Linear4bit.forward
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: forward(self, x) * 1.01)
        assert doctor._nf4().status == "fail"

    def test_a_full_disk_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for free, status in ((5e8, "fail"), (5e9, "warn"), (5e11, "ok")):
            monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
            assert doctor._disk().status == status

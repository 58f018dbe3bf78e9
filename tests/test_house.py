"""Our source keeps the house rules: order of imports, docstrings, lengths, nothing unfinished or of one machine."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.covered_by import COVERED_BY, modules
from tests.covered_by import problems as covering_problems
from tests.house_rules import (
    BEFORE_TORCH,
    CODE,
    FOUND_BY_NAME,
    HEAVY,
    LIGHT,
    MACHINE,
    MEDIAN_FILE,
    ODD,
    REGISTRY,
    ROOT,
    ROW,
    TESTS,
    TEXTS,
    UNFINISHED,
    against_the_order,
    circles,
    collect,
    dotted,
    findings,
    heavy_at_import,
    imports,
    name,
    names_of_a_run,
    room,
    too_long,
    undocumented,
    unused,
)


def test_imports_follow_the_order() -> None:
    problems = []
    for path in CODE:
        problems += [f"{name(path)}, {p}" for p in against_the_order(path.read_text(encoding="utf-8"), dotted(path))]
    assert not problems, "\n".join(problems)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not even inside a room or a function: what two files share belongs into a third."""
    problems = circles({dotted(path): path.read_text(encoding="utf-8") for path in (*CODE, *TESTS)})
    assert not problems, "\n".join(problems)


def test_nothing_is_there_that_only_tests_use() -> None:
    sources = {dotted(path): path.read_text(encoding="utf-8") for path in CODE}
    found = unused(sources)
    problems = [name for name in found if name.rpartition(".")[0] not in FOUND_BY_NAME]
    assert not problems, f"used by tests at most; remove them, or use them: {', '.join(problems)}"
    assert set(FOUND_BY_NAME) <= {name.rpartition(".")[0] for name in found}  # no excuse without a need


def test_every_room_has_a_row() -> None:
    rooms = {room(name(p).removesuffix(".py").replace("/", ".")) for p in CODE} - {None, "__init__"}
    assert rooms <= set(ROW), f"rooms without a row: {sorted(map(str, rooms - set(ROW)))}"


def test_single_files_and_the_entrances_import_nothing_heavy() -> None:
    light = [
        p
        for p in CODE
        if p.parent in (ROOT / "qllava" / "cli", ROOT / "qllava" / "page")
        or (p.parent == ROOT / "qllava" and p.stem in LIGHT | {"doctor", "__init__", "__main__"})
        or p in BEFORE_TORCH
    ]
    assert len(light) >= 10
    problems = collect(light, heavy_at_import)
    assert not problems, "\n".join(problems)


def test_conversation_takes_the_standard_library_only() -> None:
    tree = ast.parse((ROOT / "qllava/conversation.py").read_text(encoding="utf-8"))
    foreign = [target for _, target in imports(tree) if target.split(".")[0] not in sys.stdlib_module_names]
    assert not foreign


def test_everything_public_has_a_docstring() -> None:
    problems = collect(CODE, undocumented)
    assert not problems, "\n".join(problems)


def test_every_test_file_says_what_it_tests() -> None:
    silent = [
        name(p) for p in TESTS if p.read_text(encoding="utf-8").strip() and "module" in undocumented(p.read_text())
    ]
    assert not silent


def test_every_module_is_tested_somewhere() -> None:
    """By a test file of its own name, or by the one that tests/covered_by.py names."""
    assert len(modules()) > 150
    problems = covering_problems(COVERED_BY)
    assert not problems, "\n".join(problems)


def test_nothing_is_too_long() -> None:
    problems = collect(CODE, too_long)
    assert not problems, "\n".join(problems)


def test_files_are_short_as_a_rule() -> None:
    lengths = [path.read_text(encoding="utf-8").count("\n") for path in CODE]
    assert statistics.median(lengths) < MEDIAN_FILE


def test_code_messages_and_docs_use_plain_words() -> None:
    problems = collect([*CODE, *(path for path in TEXTS if path.suffix == ".md")], lambda text: findings(ODD, text))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("pattern", [UNFINISHED, REGISTRY, MACHINE], ids=["unfinished", "registry", "machine"])
def test_nothing_that_does_not_belong_into_a_file(pattern: re.Pattern[str]) -> None:
    spelling = {ROOT / "tests" / "house_rules.py", ROOT / "tests" / "test_house_rules.py"}  # what they look for
    others = [p for p in (*CODE, *TESTS, *TEXTS) if p not in spelling]
    problems = collect(others, lambda text: findings(pattern, text))
    assert not problems, "\n".join(problems)


def test_the_home_folder_is_read_in_one_place() -> None:
    """`Path.expanduser` raises an error of no use to a user where there is no such home; `config.expanded` does not."""
    ours = [p for p in CODE if not p.is_relative_to(ROOT / "benchmarks")]
    reading = [name(p) for p in ours if re.search(r"expanduser\(|Path\.home\(", p.read_text(encoding="utf-8"))]
    assert reading == ["qllava/config.py", "qllava/surroundings.py"]


def test_the_names_of_a_runs_files_are_spelled_in_one_place() -> None:
    others = [p for p in CODE if p not in (ROOT / "qllava" / "runs.py", ROOT / "qllava" / "files.py")]
    problems = collect(others, names_of_a_run)
    assert not problems, "\n".join(problems)


def test_whether_a_run_is_finished_is_asked_in_one_place() -> None:
    others = [p for p in CODE if p != ROOT / "qllava" / "runs.py"]
    problems = collect(others, lambda text: findings(re.compile(r"RESULTS_FILE\)\.(is_file|exists)"), text))
    assert not problems, "\n".join(problems)


def test_files_are_replaced_locked_and_flushed_in_one_place() -> None:
    """Not in benchmarks, which are scripts; a checkpoint's folder makes way and is removed under another name."""
    ours = [p for p in CODE if not p.is_relative_to(ROOT / "benchmarks")]
    renamed = r"\bfcntl\b|os\.(fsync|replace|rename)\(|\.rename\(|NamedTemporaryFile"
    pattern = re.compile(renamed + r"|open\([^)]*\"(a|ab|r\+b?)\"")
    found = {name(p) for p in ours if pattern.search(p.read_text(encoding="utf-8"))}
    assert found == {"qllava/files.py", "qllava/training/durable/checkpoints.py", "recipes/ablate.py"}


def test_no_file_for_odds_and_ends() -> None:
    assert not [name(p) for p in CODE if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_a_module_that_is_imported_says_nothing_on_stdout() -> None:
    """A stray print at import would break every `--json`."""
    out = subprocess.run(
        [sys.executable, "-c", "import qllava.cli"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout == ""


def hides_devices(source: str) -> bool:
    """Whether a conftest hides the GPUs before anything that could look for them is imported."""
    lines = source.splitlines()
    hides = "CUDA_VISIBLE_DEVICES" in source and [
        n for n, line in enumerate(lines) if line.startswith("os.environ.update(")
    ]
    heavy = [n for n, line in enumerate(lines) if re.match(rf"(import|from) ({'|'.join(HEAVY)}|qllava|tests)\b", line)]
    return bool(hides) and max(hides) < min(heavy)


def test_tests_compute_on_the_cpu_whatever_is_there() -> None:
    """Types, kernels and figures are others on a GPU: it is hidden from tests, and from the processes they start."""
    assert hides_devices((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    late = "import torch\nos.environ.update({'CUDA_VISIBLE_DEVICES': ''})"
    assert not hides_devices(late) and not hides_devices("import torch")
    if os.environ.get("QLLAVA_TEST_GPU") != "1":
        told = subprocess.run(
            [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout == "''\n"
    # An environment that a test makes for a process is that of the tests, with changes; these import no torch.
    new = re.compile(r"env(?:iron|ironment)? ?= ?\{(?!\*\*|name: value for)")
    assert [name(p) for p in TESTS if p != Path(__file__) and new.search(p.read_text())] == [
        "tests/synthesis/rules/test_rules.py",
        "tests/test_before_torch.py",
    ]


def prepares(path: Path) -> bool:
    """Whether a program prepares its process: itself, or in the `main` that it takes from a module of ours."""
    source = path.read_text(encoding="utf-8")
    if "prepare_process()" in source:
        return True
    modules = {target.rpartition(".")[0].replace(".", "/") for _, target in imports(ast.parse(source))}
    files = [p for m in modules if m.startswith("qllava") for p in (ROOT / f"{m}.py", ROOT / m / "__init__.py")]
    return any("prepare_process()" in p.read_text(encoding="utf-8") for p in files if p.is_file())


def test_every_program_prepares_its_process() -> None:
    """Or it fails on an output that is not UTF-8, and for a user without a home folder, after its work."""
    programs = [p for p in CODE if 'if __name__ == "__main__":' in p.read_text(encoding="utf-8")]
    assert len(programs) >= 20
    assert [name(p) for p in programs if not prepares(p)] == []


def test_version_of_citation_and_package_agree() -> None:
    import qllava

    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited.group(1) == qllava.__version__


def test_inner_libraries_are_bounded_by_minor_version() -> None:
    """What is leaned on from inside must not move unseen (architecture, decision 13)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.match(r"[\w-]+", line).group(): line for line in project["dependencies"]}  # type: ignore[union-attr]
    for package in ("trl", "peft", "transformers", "bitsandbytes"):
        assert re.search(r">=\d+\.\d+.*,<\d+\.\d+", wanted[package]), wanted[package]

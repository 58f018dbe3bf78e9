"""Recipes are commands, not a library: nothing imports them, each explains itself, and what is documented parses."""

from __future__ import annotations

import ast
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qllava.cli import _parser
from qllava.config import InputError
from qllava.evaluation.vqa import read_answer, reader
from qllava.experiments.ablation import read_grid
from qllava.training.options.defaults import NANO_FINETUNE, NANO_PRETRAIN
from qllava.training.settings import Settings, parse
from recipes import ablate, build_nano, scienceqa

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
NANO = {"finetune_lora.py": NANO_FINETUNE, "pretrain_projector.py": NANO_PRETRAIN}
OWN_FLAGS = {
    "build_nano.py": build_nano.command_line,
    "ablate.py": ablate.command_line,
    "scienceqa.py": scienceqa.command_line,
}
SHELLS = ("bash", "sh", "shell", "console")


def fenced(text: str) -> str:
    """The shell blocks of a Markdown text, one after the other."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(body for language, body in blocks if language in ("", *SHELLS))


def commands(text: str) -> list[str]:
    """The lines that run a recipe or qllava, continued lines joined, comments gone."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    wanted = [line for line in lines if re.match(r"(\$ )?(python recipes/|(\.venv/bin/)?qllava )", line)]
    return [shlex.join(shlex.split(line.removeprefix("$ "), comments=True)) for line in wanted]


def written_down() -> list[str]:
    """Every such command of the README, of docs/ and of the recipes' own docstrings."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [fenced(page.read_text(encoding="utf-8")) for page in pages]
    texts += [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in RECIPES]
    return list(dict.fromkeys(command for text in texts for command in commands(text)))


def understand(command: str, tmp_path: Path) -> object:
    """Parse a command as the program would. A YAML of the reader's own need not be there; one of ours must."""
    program, *words = shlex.split(command)
    if Path(program).name == "qllava":
        return _parser().parse_args(words)
    script, *words = words
    assert (ROOT / script).is_file(), f"{script} is not there"
    name = Path(script).name
    if name in OWN_FLAGS:
        return OWN_FLAGS[name]().parse_args(words)
    for index, word in enumerate(words):
        if index and words[index - 1] == "--config" and not (ROOT / word).exists():
            (tmp_path / "own.yaml").write_text("{}")
            words[index] = str(tmp_path / "own.yaml")
    return parse(words, output_dir="runs/example", nano=NANO[name])


@pytest.mark.parametrize("command", written_down())
def test_what_is_written_down_can_be_typed(command: str, tmp_path: Path) -> None:
    understand(command, tmp_path)


def test_commands_are_found_and_misspellings_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "```bash\nmake x\nqllava chat nano  # say\npython recipes/finetune_lora.py \\\n    --lora_r 8\n```\nqllava x\n"
    )
    assert commands(fenced(text)) == ["qllava chat nano", "python recipes/finetune_lora.py --lora_r 8"]
    assert commands(fenced("```python\nqllava chat nano\n```\n")) == []
    settings = understand("python recipes/finetune_lora.py --lora_r 8", tmp_path)
    assert isinstance(settings, Settings) and settings.model.lora_r == 8
    for wrong in ("qllava chatt nano", "python recipes/finetune_lora.py --lora_rank 8", "python recipes/build_nano.py"):
        with pytest.raises((SystemExit, InputError)):
            understand(wrong, tmp_path)
    with pytest.raises(AssertionError, match="not there"):
        understand("python recipes/no_such.py", tmp_path)


def test_the_recipes_show_how_they_are_called() -> None:
    for path in RECIPES:
        shown = commands(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        assert any(f"recipes/{path.name}" in command for command in shown), path.name


def test_qllava_does_not_import_recipes() -> None:
    """They do not even exist where the package is installed."""
    for path in sorted((ROOT / "qllava").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "recipes" for name in names), f"{path.name}, line {node.lineno}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_explains_itself(path: Path, tmp_path: Path) -> None:
    """As a program of its own, from any folder, and nothing is written."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "of the processor, in seconds"
    assert done.stdout.startswith(f"usage: {path.name}")
    assert ("--out" if path.name in OWN_FLAGS else "--train_file") in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_grid_that_is_shipped_is_understood_by_the_recipes(tmp_path: Path) -> None:
    """Every cell's settings parse, and what it measures is a command; nothing is made or run for it."""
    places = {name: (lambda name=name: tmp_path / name) for name in ("nano", "orders", "small_llama")}
    grid = read_grid(ROOT / "recipes/grids/ablate.yaml", places)
    assert len(grid.variants) == 6 and len(grid.seeds) == 3
    for variant in grid.variants:
        for number, settings in enumerate((variant.pretrain, variant.finetune)):
            (tmp_path / "cell.yaml").write_text(yaml.safe_dump(settings))
            stage = ["--config", str(tmp_path / "cell.yaml")]
            assert parse(stage, output_dir="x", nano={}).model.language_model == variant.finetune["language_model"], (
                number
            )
        asked = _parser().parse_args(["eval", *shlex.split(variant.measure)])
        assert asked.read is None or read_answer(reader(asked.read), "So. The answer is top left.") == "top left"
        assert "{" not in variant.measure.replace("{model}", "")


def test_the_grid_of_scienceqa_is_understood_too(tmp_path: Path) -> None:
    grid = read_grid(
        ROOT / "recipes/grids/scienceqa.yaml", {n: (lambda: tmp_path) for n in ("rows", "problems", "images")}
    )
    for variant, order in zip(grid.variants, ("reason-first", "answer-first"), strict=True):
        (tmp_path / "cell.yaml").write_text(yaml.safe_dump(variant.finetune))
        settings = parse(["--config", str(tmp_path / "cell.yaml")], output_dir="x", nano={})
        assert variant.pretrain is None and settings.data.train_file == f"{tmp_path}/{order}.json"
        assert _parser().parse_args(["eval", *shlex.split(variant.measure)]).order == order


def test_places_are_given_by_name() -> None:
    given = ablate.command_line().parse_args(["--place", "a=b", "c=/d=e"])
    assert given.place == [("a", Path("b").absolute()), ("c", Path("/d=e"))]
    with pytest.raises(SystemExit):
        ablate.command_line().parse_args(["--place", "a"])


def test_a_command_that_fails_is_said_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"finetune_lora failed \(The configuration .*no\.yaml does not exist\); its"):
        ablate.run(["finetune_lora", "--config", str(tmp_path / "no.yaml")], tmp_path / "log")
    assert "no.yaml" in (tmp_path / "log").read_text()

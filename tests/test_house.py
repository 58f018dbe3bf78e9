"""The house rules, read off the source: order of imports, docstrings, lengths, nothing unfinished or of one machine.

Each rule is a function from source text to problems, so that it is tested on a text that breaks it as well as on ours.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from qllava import runs
from tests.covered_by import COVERED_BY, modules
from tests.covered_by import problems as covering_problems

ROOT = Path(__file__).resolve().parents[1]

# Lower rows know nothing of higher ones; rooms of one row do not know each other.
ROWS = (
    {"conversation", "config", "image_layout", "spelling", "surroundings"},
    {"locks", "workers"},
    {"files", "runs"},
    {"page", "arguments"},
    {"data", "models", "nano"},
    {"inference", "llm"},
    {"voting"},
    {"synthesis", "evaluation"},
    {"training", "merge", "export", "doctor"},
    {"experiments", "pages", "cli"},
    {"recipes", "demo"},
    {"__main__"},  # the command by another name
)
LIGHT = {room for rooms in ROWS[:4] for room in rooms}
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "open_clip", "gradio", "datasets"}

# What a recipe's command line goes through before anything heavy is imported.
BEFORE_TORCH = {
    *(ROOT / "qllava/training/options").glob("*.py"),
    ROOT / "qllava/models/record.py",
    ROOT / "qllava/models/lora.py",
}

MAX_FUNCTION = 60
MAX_FILE = 400
MEDIAN_FILE = 180
# What a reader from anywhere has to read twice: verbs of place for "is", and negations that hide the verb.
ODD = re.compile(
    r"\b(anew|is no|stands? (?:in|on|for|beside|there)|lies? (?:in|on|there|beside)|by itself|gone through)\b", re.I
)

CODE = sorted(p for top in ("qllava", "recipes", "demo", "benchmarks") for p in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXT_NAMES = ("*.md", "*.toml", "*.cff", "*.yaml", "*.yml", "*.css", "Makefile", ".ci/run")
OURS = [p for p in ROOT.glob("[a-z]*") if p.is_dir() and p.name not in ("build", "dist", "gguf", "merged", "runs")]
TEXTS = sorted(
    {p for name in TEXT_NAMES for top in (ROOT, *OURS) for p in top.glob(name if top == ROOT else f"**/{name}")}
)


def name(path: Path) -> str:
    """A file as it is called in the repository."""
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str | None:
    """The room of a dotted name: `qllava.data.encode` is of `data`, `recipes.ablate` of `recipes`, `torch` of none."""
    first, *rest = module.split(".")
    if first == "qllava":
        return rest[0] if rest else None
    return first if first in ("recipes", "demo") else None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def against_the_order(source: str, module: str) -> list[str]:
    """Imports of a module that reach upwards, sideways, or by a relative name (which hides the room)."""
    mine = room(module)
    problems = []
    for line, target in imports(ast.parse(source)):
        other = room(target)
        if target.startswith("."):
            problems.append(f"line {line}: relative import {target}")
        elif mine is None or other is None or other in (mine, "load", "__version__"):
            continue
        elif other not in ROW:
            problems.append(f"line {line}: {target} is of a room without a row")
        elif ROW[other] >= ROW[mine]:
            problems.append(f"line {line}: {mine} (row {ROW[mine]}) imports {target} (row {ROW[other]})")
    return problems


def heavy_at_import(source: str) -> list[str]:
    """Heavy libraries that are imported when the module is, rather than inside a function or for types only."""
    tree = ast.parse(source)
    lazy = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) or _types_only(n)]
    excused = {id(inner) for node in lazy for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in excused:
            found += [target for _, target in imports(node) if target.split(".")[0] in HEAVY]
    return found


def _types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def dotted(path: Path) -> str:
    """A file as it is imported: `qllava.page` for its `__init__.py`."""
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(sources: Mapping[str, str]) -> list[str]:
    """Modules that import themselves by way of others, wherever the imports stand; each with its shortest way round.

    Args:
        sources: Source text by dotted name.
    """
    uses: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = [target for _, target in imports(ast.parse(source))]
        # `from a import b` names the module a.b, or something in the module a.
        named = {target if target in sources else target.rpartition(".")[0] for target in targets}
        uses[module] = named & sources.keys() - {module}
    found = []
    for module in uses:
        ways = [[module, used] for used in sorted(uses[module])]
        seen: set[str] = set()
        for way in ways:  # grows while it is gone through: the shortest ways come first
            if way[-1] == module:
                found.append(" -> ".join(way))
                break
            if way[-1] not in seen:
                seen.add(way[-1])
                ways += [[*way, used] for used in sorted(uses[way[-1]])]
    return found


# Modules whose names are found by name.
FOUND_BY_NAME = {
    "benchmarks.shapes": "`--shape` names its functions",
    "qllava.cli.concepts": "`qllava.cli` imports the modules of its verbs by name, and calls their `add`",
    "qllava.cli.evaluate": "as above",
    "qllava.cli.models": "as above",
    "qllava.cli.prepare": "as above",
    "qllava.cli.synthesize": "as above",
}


def unused(sources: Mapping[str, str]) -> list[str]:
    """Names of modules that nothing in these sources uses: not their own module, and no other.

    Args:
        sources: Source text by dotted name.
    """
    trees = {module: ast.parse(source) for module, source in sources.items()}
    used: set[str] = set()
    for tree in trees.values():
        bound = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                bound |= {alias.asname or alias.name: alias.name for alias in node.names}
        used |= set(bound.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                used.add(f"{bound[node.value.id]}.{node.attr}")
    found = []
    for module, tree in trees.items():
        said = [(node, mentions(node)) for node in tree.body]
        everywhere: Counter[str] = Counter()
        for _, mentioned in said:
            everywhere.update(mentioned)
        for node, mentioned in said:
            own = [name for name in defined(node) if everywhere[name] == mentioned[name] and name[:2] != "__"]
            found += [f"{module}.{name}" for name in own if f"{module}.{name}" not in used]
    return found


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def mentions(node: ast.stmt) -> Counter[str]:
    """How often each name, or text that could be one, occurs in a statement."""
    inner = list(ast.walk(node))
    texts = (one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str))
    return Counter([*(one.id for one in inner if isinstance(one, ast.Name)), *texts])


def undocumented(source: str) -> list[str]:
    """The module, and its public classes, functions and methods, that have no docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["module"]
    owners: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while owners:
        prefix, owner = owners.pop()
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                owners.append((f"{prefix}{node.name}.", node))
    return found


def too_long(source: str) -> list[str]:
    """Functions over the limit, and the file if it is."""
    tree = ast.parse(source)
    lines = source.count("\n")
    found = [f"the file has {lines} lines"] if lines > MAX_FILE else []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{node.name} has {length} lines")
    return found


OF_A_RUN = {value for key, value in vars(runs).items() if key.endswith("_FILE") or key == "PARTIAL"}


def names_of_a_run(source: str) -> list[str]:
    """Names of files in a run's folder that are spelled in code: in any text but docstrings.

    The folder of a stage 1 has the name of a key of results, so it counts in a path only: after a `/`.
    """
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    paths = {id(node.right) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            text = node.value
            said = {name for name in OF_A_RUN if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)}
            said |= {"checkpoint-"} if text.startswith("checkpoint-") else set()
            joined = text == runs.STAGE1 and id(node) in paths
            said |= {runs.STAGE1} if joined or text.startswith(f"{runs.STAGE1}/") else set()
            found += [f"line {node.lineno}: {name}" for name in sorted(said)]
    return found


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
REGISTRY = re.compile(r"\b(pypi|pythonhosted|download\.pytorch|conda\.anaconda)\.(org|com)\b|--(extra-)?index-url")
MACHINE = re.compile(r"(?<![\w.~$}/])/(home|root|Users|mnt|work)/\w")


def findings(pattern: re.Pattern[str], text: str) -> list[str]:
    """Lines in which a pattern occurs, with their numbers."""
    return [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def collect(paths: list[Path], rule: object) -> list[str]:
    """All problems of all files, each with its file: one run shows everything that is to be mended."""
    assert callable(rule)
    return [f"{name(p)}: {problem}" for p in paths for problem in rule(p.read_text(encoding="utf-8"))]


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
    others = [p for p in (*CODE, *TESTS, *TEXTS) if p != Path(__file__)]  # this file spells what it looks for
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


class TestTheRulesThemselves:
    """Each rule finds what it is there for."""

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("qllava.conversation", "from qllava.config import InputError"),
            ("qllava.data.encode", "from qllava.models.vision import load_tower"),
            ("qllava.data.encode", "def f():\n    import qllava.training.trainer"),
            ("qllava.inference.chat", "from qllava import evaluation"),
            ("qllava.evaluation.judge", "from qllava.synthesis.prompting import shown"),
            ("qllava.merge", "from qllava.cli import main"),
            ("recipes.finetune_lora", "from demo.app import main"),
            ("qllava.data.encode", "from . import formats"),
            ("qllava.data.encode", "from qllava.cupboard import things"),
        ],
    )
    def test_order(self, module: str, source: str) -> None:
        assert against_the_order(source, module)

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("qllava.data.encode", "from qllava.conversation import Turn\nfrom qllava.data.formats import Example"),
            ("qllava.training.trainer", "from qllava.evaluation.vqa import score"),
            ("qllava.experiments.ablation", "import torch\nimport qllava\nfrom qllava import load"),
            ("qllava", "from qllava.inference import load"),
        ],
    )
    def test_order_lets_pass(self, module: str, source: str) -> None:
        assert against_the_order(source, module) == []

    def test_circles(self) -> None:
        three = {
            "a.one": "from a import two, three",
            "a.two": "def f():\n    from a.three import x",
            "a.three": "import a.one",
        }
        assert circles(three) == [
            "a.one -> a.three -> a.one",
            "a.two -> a.three -> a.one -> a.two",
            "a.three -> a.one -> a.three",
        ]
        assert circles({"a": "from a.one import x", "a.one": "from a.two import a", "a.two": "import torch"}) == []
        assert circles({"a": "from a.one import x", "a.one": "from a import y"}) == [
            "a -> a.one -> a",
            "a.one -> a -> a.one",
        ]

    def test_unused(self) -> None:
        sources = {
            "a.one": "X = 1\ndef f(): return f()\ndef g(): return 1\n__all__ = ['h']\ndef h(): ...\nclass _C: ...",
            "a.two": "from a.one import g\nfrom a import three as t\ny = t.used\nprint(y)",
            "a.three": "used: int = 1\nother = 2\ndef one(): return other",
        }
        assert unused(sources) == ["a.one.X", "a.one.f", "a.one._C", "a.three.one"]

    def test_heavy(self) -> None:
        assert heavy_at_import("import torch.nn") == ["torch.nn"]
        assert heavy_at_import("try:\n    from trl import SFTConfig\nexcept ImportError:\n    pass") == [
            "trl.SFTConfig"
        ]
        assert heavy_at_import("def f():\n    import torch\nif TYPE_CHECKING:\n    import trl\nimport json") == []

    def test_docstrings(self) -> None:
        source = "class A:\n    def f(self): ...\n    def _g(self): ...\ndef h():\n    '''Say.'''"
        assert undocumented(source) == ["module", "A", "A.f"]

    def test_lengths(self) -> None:
        assert too_long("def f():\n" + "    pass\n" * MAX_FUNCTION) == [f"f has {MAX_FUNCTION + 1} lines"]
        assert too_long("def f():\n" + "    pass\n" * (MAX_FUNCTION - 1)) == []
        assert too_long("#\n" * (MAX_FILE + 1)) == [f"the file has {MAX_FILE + 1} lines"]

    def test_names_of_a_run(self) -> None:
        for source in (
            "folder / 'results.json'", "f'no {x}, no metrics.jsonl.'", "('a', 'adapter_config.json')",
            "folder / 'stage1' / x", "x = 'stage1/x'", "x = f'checkpoint-{step}'", "place / '.partial'",
        ):  # fmt: skip
            assert len(names_of_a_run(source)) == 1, source
        for source in ("'results.json is last.'", "found['stage1']", "x = 'my_results.json'", "x = 'a checkpoint-x'"):
            assert names_of_a_run(source) == []

    def test_patterns(self) -> None:
        assert findings(UNFINISHED, "x = 1  # TODO: more") and not findings(UNFINISHED, "the method Todos")
        assert findings(REGISTRY, "see https://pypi.org/project") and not findings(REGISTRY, "pip install -e .")
        assert findings(MACHINE, 'open("/home/me/x")') and not findings(MACHINE, "runs/home/x, ~/work/x")
        odd = ("a text that is no JSON", "it stands in the file", "lies beside it", "begins anew", "ends by itself")
        assert all(findings(ODD, text) for text in odd) and not findings(ODD, "It is not JSON; stand-ins lie about it")

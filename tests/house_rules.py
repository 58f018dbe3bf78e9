"""The house rules, as functions from source text to problems, and the files that they apply to.

`test_house.py` applies them to our files; `test_house_rules.py` tests each with a text that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from qllava import runs

ROOT = Path(__file__).resolve().parents[1]

# A room (a package or a top module) may import only rooms of earlier rows, not of its own row or of later ones.
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
    {"__main__"},  # `python -m qllava`
)
LIGHT = {room for rooms in ROWS[:4] for room in rooms}
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "open_clip", "gradio", "datasets"}

# Modules that check a recipe's command line before anything heavy is imported.
BEFORE_TORCH = {
    *(ROOT / "qllava/training/options").glob("*.py"),
    ROOT / "qllava/models/record.py",
    ROOT / "qllava/models/lora.py",
}

MAX_FUNCTION = 60
MAX_FILE = 400
MEDIAN_FILE = 180
# Expressions that are hard to read for non-native speakers: verbs of place for "is", and "no" instead of "not".
ODD = re.compile(
    r"\b(anew|(?<!there )is no|stands? (?:in|on|for|beside|there)|lies? (?:in|on|there|beside)|by itself|"
    r"gone through)\b",
    re.I,
)

CODE = sorted(p for top in ("qllava", "recipes", "demo", "benchmarks") for p in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXT_NAMES = ("*.md", "*.toml", "*.cff", "*.yaml", "*.yml", "*.css", "Makefile", ".ci/run")
OURS = [p for p in ROOT.glob("[a-z]*") if p.is_dir() and p.name not in ("build", "dist", "gguf", "merged", "runs")]
TEXTS = sorted(
    {p for name in TEXT_NAMES for top in (ROOT, *OURS) for p in top.glob(name if top == ROOT else f"**/{name}")}
)


def name(path: Path) -> str:
    """Return the path of a file from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str | None:
    """Return the room of a dotted name: `qllava.data.encode` has `data`, `recipes.ablate` `recipes`, `torch` None."""
    first, *rest = module.split(".")
    if first == "qllava":
        return rest[0] if rest else None
    return first if first in ("recipes", "demo") else None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return line and dotted name of every import, at any place; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def against_the_order(source: str, module: str) -> list[str]:
    """Return the imports of a module from the same or later rows, and relative ones (which hide the room)."""
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
    """Return heavy libraries that are imported with the module, rather than in a function or only for types."""
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
    """Return the name by which a file is imported: `qllava.page` for its `__init__.py`."""
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(sources: Mapping[str, str]) -> list[str]:
    """Return the import cycles, wherever the imports are: the shortest one of each module that imports itself.

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
        for way in ways:  # the loop appends to this list, so the shortest ways come first
            if way[-1] == module:
                found.append(" -> ".join(way))
                break
            if way[-1] not in seen:
                seen.add(way[-1])
                ways += [[*way, used] for used in sorted(uses[way[-1]])]
    return found


# Modules whose names are looked up at run time, and where.
FOUND_BY_NAME = {
    "benchmarks.shapes": "`--shape` names its functions",
    "qllava.cli.concepts": "`qllava.cli` imports the modules of its verbs by name, and calls their `add`",
    "qllava.cli.evaluate": "as above",
    "qllava.cli.models": "as above",
    "qllava.cli.prepare": "as above",
    "qllava.cli.synthesize": "as above",
}


def unused(sources: Mapping[str, str]) -> list[str]:
    """Return names that modules define and that nothing in these sources uses.

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
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def mentions(node: ast.stmt) -> Counter[str]:
    """Return how often each name, or string that could be one, occurs in a statement."""
    inner = list(ast.walk(node))
    texts = (one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str))
    return Counter([*(one.id for one in inner if isinstance(one, ast.Name)), *texts])


def undocumented(source: str) -> list[str]:
    """Return what has no docstring: the module, or its public classes, functions and methods."""
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
    """Return functions that are over the limit, and the file if it is."""
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
    """Return names of files in a run's folder that are written out in code, in any string but docstrings.

    The folder of stage 1 has the same name as a key of the results, so it counts only in a path, after a `/`.
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
    """Return the lines in which a pattern occurs, with their numbers."""
    return [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def collect(paths: list[Path], rule: object) -> list[str]:
    """Return the problems of all files, each with its file, so that one run shows everything that must be changed."""
    assert callable(rule)
    return [f"{name(p)}: {problem}" for p in paths for problem in rule(p.read_text(encoding="utf-8"))]

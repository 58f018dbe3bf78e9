"""What no line of ours does: run text as code, unpickle, unpack by names from outside, trust a model's own code.

Each rule is tried on a line that breaks it, as in `tests/test_house_rules.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.house_rules import CODE, collect, name

# Text as code, commands through a shell, pickles, and archives that are unpacked by the names that they give.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("torch.save", "torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "joblib.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("shutil.unpack_archive", "zipfile.ZipFile", "load_dataset", "datasets.load_dataset"),
}
FORBIDDEN_ENDS = (".extract", ".extractall", ".read_pickle", ".to_pickle")
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "zipfile"}
LOADERS = {"AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoModelForCausalLM"}
LOADERS |= {"LlavaProcessor"}  # a concrete class, but what it is made of comes through the Auto classes

# errors.py: the name of the error that a pickled tower raises. check.py: a file in a folder that the process has made,
# from it to its own workers.
EXCUSED = {"qllava/models/errors.py": {"pickle"}, "qllava/data/check.py": {"pickle"}}


# The command that converts pickled weights, which only a user starts.
CONVERTS = "qllava/models/convert.py"
# The builder of nano's weights resumes from a file of its own.
RESUMES = "qllava/nano/kept.py"


def dotted(node: ast.AST) -> str:
    """The name of what is called, as it is written."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(source: str) -> Iterator[tuple[int, str, dict[str, ast.expr]]]:
    """Line, name and keyword arguments of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func), {k.arg: k.value for k in node.keywords if k.arg}


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def dangerous(source: str) -> list[str]:
    """Calls that run or unpack what comes from outside."""
    found = []
    for line, called, keywords in calls(source):
        if called in FORBIDDEN or called.endswith(FORBIDDEN_ENDS):
            found.append(f"line {line}: {called}")
        if "shell" in keywords and constant(keywords["shell"]) is not False:
            found.append(f"line {line}: {called} with a shell")
    return found


def forbidden_imports(source: str) -> set[str]:
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named.add(node.module.split(".")[0])
    return named & FORBIDDEN_IMPORTS


def trusting(source: str) -> list[str]:
    """Loaders that are not told to run no code: without a word transformers asks whoever sits at the terminal."""
    found = []
    for line, called, keywords in calls(source):
        if "trust_remote_code" in keywords and constant(keywords["trust_remote_code"]) is not False:
            found.append(f"line {line}: {called} trusts")
        owner, _, method = called.rpartition(".")
        if method == "from_pretrained" and owner in LOADERS and "trust_remote_code" not in keywords:
            found.append(f"line {line}: {called} is not told")
    return found


def markup(source: str) -> list[str]:
    """Places that call a text markup: only what is known to be escaped may be."""
    return [f"line {line}" for line, called, _ in calls(source) if called.split(".")[-1] == "Html"]


def test_nothing_runs_or_unpacks_what_comes_from_outside() -> None:
    ours = [path for path in CODE if not name(path).startswith("benchmarks/") and name(path) not in (CONVERTS, RESUMES)]
    assert not collect(ours, dangerous)


@pytest.mark.parametrize(("place", "called"), [(CONVERTS, {"torch.load"}), (RESUMES, {"torch.load", "torch.save"})])
def test_pickled_weights_are_read_as_tensors_only_and_in_two_places(place: str, called: set[str]) -> None:
    source = next(path for path in CODE if name(path) == place).read_text(encoding="utf-8")
    assert {problem.split(": ")[1] for problem in dangerous(source)} == called
    loads = [keywords for _, called, keywords in calls(source) if called == "torch.load"]
    assert loads and all(constant(keywords.get("weights_only")) is True for keywords in loads)
    imported = [name(path) for path in CODE if "qllava.models.convert import" in path.read_text(encoding="utf-8")]
    assert imported == []  # a user's own command, and a step of nothing


def test_pickle_is_imported_where_it_is_excused_only() -> None:
    found = {name(path): forbidden_imports(path.read_text(encoding="utf-8")) for path in CODE}
    assert {path: names for path, names in found.items() if names} == EXCUSED


def test_no_model_brings_code() -> None:
    assert not collect([path for path in CODE if not name(path).startswith("benchmarks/")], trusting)


def test_markup_is_made_in_one_place() -> None:
    """Everything else hands text to `qllava.page`, which escapes it; `inspect` marks pieces that it has escaped."""
    makers = {name(path) for path in CODE if markup(path.read_text(encoding="utf-8"))}
    pages = {"qllava/page/__init__.py", "qllava/page/charts.py"}
    assert pages <= makers <= {*pages, "qllava/data/inspect.py"}


class TestTheRulesThemselves:
    """Each rule finds what it is there for."""

    @pytest.mark.parametrize(
        "line",
        [
            "eval(text)", "exec(text)", "os.system('ls')", "subprocess.run('ls', shell=True)", "yaml.load(text)",
            "subprocess.Popen(line, shell=shell)", "torch.load(path, weights_only=True)", "torch.save(a, path)",
            "tar.extractall(folder)", "tar.extract(one)", "zipfile.ZipFile(path)", "datasets.load_dataset(name)",
        ],
    )  # fmt: skip
    def test_dangerous(self, line: str) -> None:
        assert dangerous(line)

    def test_what_is_harmless_passes(self) -> None:
        assert dangerous("model.eval()\nyaml.safe_load(t)\nsubprocess.run(['ls'])\nre.compile(t)") == []
        assert forbidden_imports("import json\nfrom a import pickle") == set()
        assert trusting("AutoConfig.from_pretrained(n, trust_remote_code=False)\nT.from_pretrained(n)") == []

    def test_imports_trust_and_markup(self) -> None:
        assert forbidden_imports("def f():\n    from pickle import loads") == {"pickle"}
        assert trusting("AutoConfig.from_pretrained(n)") and trusting("C.load(n, trust_remote_code=given)")
        assert markup("page.Html(text)") and not markup("page.code(text)")

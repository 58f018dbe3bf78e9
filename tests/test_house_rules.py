"""Each house rule finds what it is there for, and nothing else."""

from __future__ import annotations

import pytest

from tests.house_rules import (
    MACHINE,
    MAX_FILE,
    MAX_FUNCTION,
    ODD,
    REGISTRY,
    UNFINISHED,
    against_the_order,
    circles,
    findings,
    heavy_at_import,
    names_of_a_run,
    too_long,
    undocumented,
    unused,
)


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
def test_order(module: str, source: str) -> None:
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
def test_order_lets_pass(module: str, source: str) -> None:
    assert against_the_order(source, module) == []


def test_circles() -> None:
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


def test_unused() -> None:
    sources = {
        "a.one": "X = 1\ndef f(): return f()\ndef g(): return 1\n__all__ = ['h']\ndef h(): ...\nclass _C: ...",
        "a.two": "from a.one import g\nfrom a import three as t\ny = t.used\nprint(y)",
        "a.three": "used: int = 1\nother = 2\ndef one(): return other",
    }
    assert unused(sources) == ["a.one.X", "a.one.f", "a.one._C", "a.three.one"]


def test_heavy() -> None:
    assert heavy_at_import("import torch.nn") == ["torch.nn"]
    assert heavy_at_import("try:\n    from trl import SFTConfig\nexcept ImportError:\n    pass") == ["trl.SFTConfig"]
    assert heavy_at_import("def f():\n    import torch\nif TYPE_CHECKING:\n    import trl\nimport json") == []


def test_docstrings() -> None:
    source = "class A:\n    def f(): ...\n    def _g(): ...\ndef h():\n    '''Say.'''"
    assert undocumented(source) == ["module", "A", "A.f"]


def test_lengths() -> None:
    assert too_long("def f():\n" + "    pass\n" * MAX_FUNCTION) == [f"f has {MAX_FUNCTION + 1} lines"]
    assert too_long("def f():\n" + "    pass\n" * (MAX_FUNCTION - 1)) == []
    assert too_long("#\n" * (MAX_FILE + 1)) == [f"the file has {MAX_FILE + 1} lines"]


def test_names_of_a_run() -> None:
    for source in (
        "folder / 'results.json'", "f'no {x}, no metrics.jsonl.'", "('a', 'adapter_config.json')",
        "folder / 'stage1' / x", "x = 'stage1/x'", "x = f'checkpoint-{step}'", "place / '.partial'",
    ):  # fmt: skip
        assert len(names_of_a_run(source)) == 1, source
    for source in ("'results.json is last.'", "found['stage1']", "x = 'my_results.json'", "x = 'a checkpoint-x'"):
        assert names_of_a_run(source) == []


def test_patterns() -> None:
    assert findings(UNFINISHED, "x = 1  # TODO: more") and not findings(UNFINISHED, "the method Todos")
    assert findings(REGISTRY, "see https://pypi.org/project") and not findings(REGISTRY, "pip install -e .")
    assert findings(MACHINE, 'open("/home/me/x")') and not findings(MACHINE, "runs/home/x, ~/work/x")
    odd = ("a text that is no JSON", "it stands in the file", "lies beside it", "begins anew", "ends by itself")
    plain = "It is not JSON; there is no star; stand-ins lie about it"
    assert all(findings(ODD, text) for text in odd) and not findings(ODD, plain)

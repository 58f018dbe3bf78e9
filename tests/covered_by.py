"""Table of the test files of modules that have no test file of their own name, and the check of this table.

`qllava/data/encode.py` is tested by `tests/data/test_encode.py` and needs no line. A test file in the table must import
the module, or a module of this repository that imports it, or run it as a command.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COVERED_BY: dict[str, str] = {
    "qllava/__init__.py": "tests/test_cli.py",
    "qllava/__main__.py": "tests/test_cli.py",
    "qllava/arguments.py": "tests/training/options/test_fields.py",
    "qllava/cli/concepts.py": "tests/synthesis/test_filtering.py",
    "qllava/cli/evaluate.py": "tests/test_cli.py",
    "qllava/cli/judging.py": "tests/evaluation/test_judge.py",
    "qllava/cli/models.py": "tests/test_cli.py",
    "qllava/cli/prepare.py": "tests/test_surroundings.py",
    "qllava/cli/synthesize.py": "tests/synthesis/test_command.py",
    "qllava/config.py": "tests/test_surroundings.py",
    "qllava/data/coco.py": "tests/data/test_contexts.py",
    "qllava/data/problems.py": "tests/data/test_check.py",
    "qllava/data/turns.py": "tests/data/test_formats.py",
    "qllava/data/verdict.py": "tests/data/test_check.py",
    "qllava/doctor.py": "tests/test_cli.py",
    "qllava/evaluation/answers.py": "tests/evaluation/test_scienceqa.py",
    "qllava/evaluation/asking.py": "tests/evaluation/test_judge.py",
    "qllava/evaluation/judgments.py": "tests/evaluation/test_judge_votes.py",
    "qllava/evaluation/pages.py": "tests/security/test_pages.py",
    "qllava/experiments/report.py": "tests/experiments/test_ablation.py",
    "qllava/export/tensors.py": "tests/export/test_gguf.py",
    "qllava/inference/about.py": "tests/inference/test_session.py",
    "qllava/inference/kept_images.py": "tests/inference/test_session.py",
    "qllava/llm/address.py": "tests/llm/test_client.py",
    "qllava/llm/completions.py": "tests/llm/test_client.py",
    "qllava/llm/patience.py": "tests/llm/test_client.py",
    "qllava/locks.py": "tests/test_files.py",
    "qllava/models/adapter.py": "tests/models/test_assemble.py",
    "qllava/models/card.py": "tests/inference/test_decoding.py",
    "qllava/models/convert.py": "tests/models/test_hub.py",
    "qllava/models/decided.py": "tests/models/test_hub.py",
    "qllava/models/delta.py": "tests/test_merge.py",
    "qllava/models/errors.py": "tests/models/test_hub.py",
    "qllava/models/known.py": "tests/test_presets.py",
    "qllava/models/language.py": "tests/models/test_assemble.py",
    "qllava/models/layouts.py": "tests/models/test_hub.py",
    "qllava/models/outline.py": "tests/models/test_agreement.py",
    "qllava/models/recommended.py": "tests/inference/test_decoding.py",
    "qllava/models/record.py": "tests/training/test_settings.py",
    "qllava/models/weights.py": "tests/models/test_hub.py",
    "qllava/nano/patterns.py": "tests/nano/test_wording.py",
    "qllava/nano/talk.py": "tests/nano/test_wording.py",
    "qllava/nano/texts.py": "tests/nano/test_llama.py",
    "qllava/nano/unknown.py": "tests/nano/test_wording.py",
    "qllava/page/charts.py": "tests/test_page.py",
    "qllava/page/markup.py": "tests/test_page.py",
    "qllava/pages/access.py": "tests/pages/test_uploads.py",
    "qllava/pages/compare.py": "tests/pages/test_uploads.py",
    "qllava/pages/guard.py": "tests/pages/test_server.py",
    "qllava/pages/page.py": "tests/pages/test_server.py",
    "qllava/pages/talk.py": "tests/pages/test_server.py",
    "qllava/pages/visitors.py": "tests/pages/test_uploads.py",
    "qllava/synthesis/balance.py": "tests/synthesis/test_filtering.py",
    "qllava/synthesis/live.py": "tests/synthesis/test_pipeline.py",
    "qllava/synthesis/output.py": "tests/synthesis/test_pipeline.py",
    "qllava/synthesis/rules/examples.py": "tests/synthesis/rules/test_rules.py",
    "qllava/synthesis/rules/nouns.py": "tests/synthesis/rules/test_asserted.py",
    "qllava/synthesis/rules/questions.py": "tests/synthesis/rules/test_rules.py",
    "qllava/synthesis/rules/view.py": "tests/synthesis/rules/test_rules.py",
    "qllava/synthesis/tasks.py": "tests/synthesis/test_pipeline.py",
    "qllava/synthesis/words.py": "tests/synthesis/rules/test_rules.py",
    "qllava/training/base.py": "tests/models/test_bases.py",
    "qllava/training/callbacks.py": "tests/training/test_trainer.py",
    "qllava/training/durable/checkpoints.py": "tests/faults/test_survives.py",
    "qllava/training/durable/contents.py": "tests/training/durable/test_processes.py",
    "qllava/training/durable/disk.py": "tests/faults/test_disk.py",
    "qllava/training/durable/zero.py": "tests/training/durable/test_processes.py",
    "qllava/training/fitting.py": "tests/training/durable/test_processes.py",
    "qllava/training/folders.py": "tests/training/test_outcome.py",
    "qllava/training/main.py": "tests/training/test_run.py",
    "qllava/training/measures.py": "tests/training/test_samples.py",
    "qllava/training/memory/fake.py": "tests/training/memory/test_memory.py",
    "qllava/training/memory/fit.py": "tests/training/memory/test_memory.py",
    "qllava/training/memory/paged.py": "tests/training/test_out_of_memory.py",
    "qllava/training/memory/rehearsal.py": "tests/training/test_out_of_memory.py",
    "qllava/training/memory/step.py": "tests/training/memory/test_memory.py",
    "qllava/training/objectives/held_out.py": "tests/training/objectives/test_supervised.py",
    "qllava/training/objectives/objective.py": "tests/training/objectives/test_supervised.py",
    "qllava/training/options/before.py": "tests/training/test_every_field.py",
    "qllava/training/options/begin.py": "tests/training/test_settings.py",
    "qllava/training/options/command.py": "tests/training/test_every_field.py",
    "qllava/training/options/defaults.py": "tests/test_recipes.py",
    "qllava/training/options/sizes.py": "tests/training/memory/test_memory.py",
    "qllava/training/options/table.py": "tests/training/options/test_fields.py",
    "qllava/training/options/typed.py": "tests/training/options/test_fields.py",
    "qllava/training/plan.py": "tests/models/test_agreement.py",
    "qllava/training/scores.py": "tests/training/test_samples.py",
    "qllava/training/stage.py": "tests/training/test_run.py",
    "qllava/training/stages.py": "tests/training/test_trainer.py",
    "qllava/training/step/attention.py": "tests/training/step/test_kernels.py",
    "qllava/training/trial.py": "tests/training/test_every_field.py",
    "qllava/voting/votes.py": "tests/voting/test_duel.py",
    "recipes/ablate.py": "tests/test_recipes.py",
    "recipes/build_nano.py": "tests/test_recipes.py",
    "recipes/cluster/ray_train.py": "tests/test_cluster.py",
    "recipes/finetune_lora.py": "tests/distributed/test_launched.py",
    "recipes/pretrain_projector.py": "tests/faults/test_survives.py",
    "recipes/scienceqa.py": "tests/evaluation/test_scienceqa.py",
    "demo/app.py": "tests/pages/test_server.py",
}


def modules() -> list[str]:
    """Return the paths of all modules of the package, the recipes and the demo, except `__init__.py` without code."""
    files = [path for top in ("qllava", "recipes", "demo") for path in sorted((ROOT / top).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py" or _defines(path)]


def _defines(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in _tree(path).body)


def own(module: str) -> list[str]:
    """Return the paths that a test file of the module's own name can have."""
    path = Path(module)
    folder = path.parent.relative_to("qllava") if path.parts[0] == "qllava" else Path()
    if path.name == "__init__.py":
        name = path.parent.name
        return [f"tests/{folder}/test_{name}.py", f"tests/{folder.parent}/test_{name}.py".replace("/./", "/")]
    return [(Path("tests") / folder / f"test_{path.stem}.py").as_posix()]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(path: Path) -> frozenset[str]:
    """Return the files of this repository that a file imports, at any place in it."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] not in ("qllava", "recipes", "demo", "tests"):
                continue
            at = ROOT / name.replace(".", "/")
            for found in (at.with_suffix(".py"), at / "__init__.py"):
                if found.is_file():
                    yield found.relative_to(ROOT).as_posix()


@cache
def reached(test: str) -> frozenset[str]:
    """Return modules that a test file, its helpers and the commands it runs import, and those that these import.

    The imports of a package count like those of the file that imports it.
    """
    direct = set(_imports(ROOT / test))
    for helper in [found for found in direct if found.startswith("tests/")]:
        direct |= _imports(ROOT / helper)
    for command in (found for found in modules() if not found.startswith("qllava/")):
        direct |= _imports(ROOT / command) if runs(test, command) else set()
    for package in [found for found in direct if found.endswith("/__init__.py")]:
        direct |= _imports(ROOT / package)
    return frozenset(direct | {found for module in direct for found in _imports(ROOT / module)})


def runs(test: str, module: str) -> bool:
    """Return whether a test file, or a helper of it, contains the path of a module that is a command."""
    spelled = {module, " / ".join(f'"{part}"' for part in module.split("/"))}
    spelled |= {'"-m", "qllava"'} if module == "qllava/__main__.py" else set()
    helpers = [found for found in _imports(ROOT / test) if found.startswith("tests/")]
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in (test, *helpers)]
    return any(words in text for words in spelled for text in texts)


def problems(table: dict[str, str]) -> list[str]:
    """Return a sentence for each module without a test file, and for each line that is unnecessary or wrong."""
    found = []
    for module in modules():
        has = any((ROOT / test).is_file() for test in own(module))
        test = table.get(module)
        if test is None and not has:
            found.append(f"{module} has no {own(module)[0]}, and no line in tests/covered_by.py says what tests it.")
        elif test is not None and has:
            found.append(f"{module} has a test file of its own name; remove its line from tests/covered_by.py.")
        elif test is not None and not (ROOT / test).is_file():
            found.append(f"{module} is said to be tested by {test}, which does not exist.")
        elif test is not None and not (module in reached(test) or runs(test, module)):
            found.append(f"{module} is said to be tested by {test}, which neither imports nor runs it.")
    gone = sorted(set(table) - set(modules()))
    return found + [f"{module} has a line in tests/covered_by.py and does not exist." for module in gone]

"""Sample answers: those from before the training are of the model that the training starts with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qllava.conversation import Conversation, Turn
from qllava.data.formats import Example
from qllava.data.problems import Place
from qllava.models.adapter import projector_state
from qllava.training import alignment, run, samples, scores
from qllava.training.run import finetune
from tests.tiny_models import make_tiny_model, make_tiny_processor
from tests.tiny_runs import Tiny, settings, stage2_settings, write_records


class StopHereError(Exception):
    """Raised in place of stage 2's training."""


def weights(state: dict[str, torch.Tensor]) -> str:
    """A model "answers" with a figure of its projector, in these tests."""
    return f"{sum(float(tensor.double().abs().sum()) for tensor in state.values()):.6f}"


def lora(model: Any) -> str:
    b = [p.detach() for name, p in model.named_parameters() if "lora_B" in name]
    return f"{sum(float(p.double().abs().sum()) for p in b):.6f}"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers say which weights gave them; stage 1 "learns" a projector of halves, and stage 2 is not trained."""

    def trained(stage: Any, model: Any, assembled: Any) -> dict[str, float]:
        if stage.kind.adapter:
            raise StopHereError
        assert stage.config.eval_strategy == "no", "eval_file is for stage 2, and nothing is said about it here"
        with torch.no_grad():
            for parameter in assembled.model.model.multi_modal_projector.parameters():
                parameter.fill_(0.5)
        return {}

    for module in (run, alignment):
        monkeypatch.setattr(module, "train_stage", trained)
    monkeypatch.setattr(
        scores,
        "answers",
        lambda model, _, examples, *__, **___: [f"{weights(projector_state(model))} {lora(model)}"] * len(examples),
    )


def begun(chosen: Any) -> tuple[str, str]:
    """(projector, LoRA) of the model that gave the answers from before."""
    with pytest.raises(StopHereError):
        finetune(chosen)
    kept = json.loads((Path(chosen.train.output_dir) / samples.BEFORE_FILE).read_text(encoding="utf-8"))
    (answer,) = {row["answer"] for row in kept}
    assert len(kept) == 8 and {"question", "images"} <= kept[0].keys()
    projector, _, adapter = answer.partition(" ")
    return projector, adapter


NOTHING = "0.000000"


@pytest.mark.usefixtures("started")
class TestBefore:
    def test_with_a_projector(self, tiny: Tiny, tmp_path: Path) -> None:
        given = weights(load_file(tiny.stage1 / "projector.safetensors"))
        assert begun(stage2_settings(tiny, tmp_path / "run")) == (given, NOTHING)

    def test_after_a_stage_1_of_its_own(self, tiny: Tiny, tmp_path: Path) -> None:
        captions = [{"image": "0.png", "question": "<image>", "answer": "red"}]
        chosen = settings(
            tiny, tmp_path / "run", pretrain_file=write_records(tmp_path / "captions.json", captions),
            image_folder=tiny.rows.parent, eval_file=tiny.rows, eval_strategy="steps",
        )  # fmt: skip
        shapes = load_file(tiny.stage1 / "projector.safetensors")
        assert begun(chosen) == (weights({name: torch.full_like(x, 0.5) for name, x in shapes.items()}), NOTHING)

    def test_of_a_llava_that_exists(self, tiny: Tiny, hf_layout: Path, tmp_path: Path) -> None:
        chosen = settings(
            tiny, tmp_path / "run", language_model=None, vision_tower=None, model_name_or_path=hf_layout,
            eval_file=tiny.rows,
        )  # fmt: skip
        own = make_tiny_model(make_tiny_processor()).model.multi_modal_projector.state_dict()
        assert begun(chosen) == (weights(own), NOTHING)

    def test_of_an_adapter_that_is_trained_on(self, tiny: Tiny, tmp_path: Path) -> None:
        parts = {"language_model": None, "vision_tower": None, "template": None, "lora_r": None, "lora_alpha": None}
        chosen = settings(
            tiny, tmp_path / "run", **parts, lora_dropout=0, model_name_or_path=tiny.stage2, eval_file=tiny.rows
        )
        adapter = load_file(tiny.stage2 / "adapter_model.safetensors")
        b = sum(float(x.double().abs().sum()) for name, x in adapter.items() if "lora_B" in name)
        assert b > 0
        assert begun(chosen) == (weights(load_file(tiny.stage2 / "projector.safetensors")), f"{b:.6f}")


class TestAResumedRun:
    def resumed(self, tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[dict[str, Any]]:
        """samples.json of the fixture's run, which is given its command again as if it had never ended."""
        monkeypatch.setattr(run, "train_stage", lambda *_: {})
        monkeypatch.setattr(scores, "answers", lambda model, _, examples, *__, **___: ["now"] * len(examples))
        finetune(stage2_settings(tiny, folder, **fields))
        found: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        assert [row["after"] for row in found] == ["now"] * len(found)
        return found

    def copied(self, tiny: Tiny, folder: Path) -> list[dict[str, Any]]:
        shutil.copytree(tiny.stage2, folder)
        (folder / "results.json").unlink()
        kept: list[dict[str, Any]] = json.loads((folder / samples.BEFORE_FILE).read_text(encoding="utf-8"))
        return kept

    def test_keeps_the_answers_of_its_first_start(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = self.copied(tiny, tmp_path / "run")
        found = self.resumed(tiny, tmp_path / "run", monkeypatch)
        assert [row["before"] for row in found] == [row["answer"] for row in kept] and len(kept) == 8

    def test_knows_none_of_a_question_that_is_new(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = self.copied(tiny, tmp_path / "run")
        rows = json.loads(tiny.rows.read_text(encoding="utf-8"))
        rows[0]["conversations"][-2]["value"] += " Say why."
        other = write_records(tmp_path / "other.json", rows)
        found = self.resumed(tiny, tmp_path / "run", monkeypatch, eval_file=other, image_folder=tiny.rows.parent)
        assert found[0]["before"] is None
        assert [row["before"] for row in found[1:]] == [row["answer"] for row in kept[1:]]

    def test_takes_none_of_a_model_that_has_learned(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.copied(tiny, tmp_path / "run")
        (tmp_path / "run" / samples.BEFORE_FILE).unlink()
        found = self.resumed(tiny, tmp_path / "run", monkeypatch)
        assert {row["before"] for row in found} == {None}

    def test_asks_again_where_its_first_start_left_nothing_to_resume(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That start may have had another projector, and nothing refuses the new one."""
        self.copied(tiny, tmp_path / "run")
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        found = self.resumed(tiny, tmp_path / "run", monkeypatch)
        assert {row["before"] for row in found} == {"now"}


def example(number: int, image: Path, *said: str) -> Example:
    """A conversation whose turns say this; one about the same question unless they differ before it."""
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[i % 2], text) for i, text in enumerate((*said, "<image> What is it?", "It is this.")))
    return Example(f"row-{number}", (image,), Conversation(turns=turns), Place("rows.json", row=number))


def test_answers_of_images_with_one_name_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of questions that differ in what was said before them; also when run and images have moved."""

    def rows(root: Path) -> list[Example]:
        return [
            example(1, root / "cats" / "0001.jpg"),
            example(2, root / "dogs" / "0001.jpg"),
            example(3, root / "dogs" / "0001.jpg", "Hello.", "Good day."),
        ]

    given: Any = None
    monkeypatch.setattr(scores, "answers", lambda _, __, examples, *___: [f"a {e.id}" for e in examples])
    expected = ["a row-1", "a row-2", "a row-3"]
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    assert samples.before(run_folder, given, given, rows(tmp_path / "here"), given) == expected
    (run_folder / "checkpoint-2").mkdir()
    monkeypatch.setattr(scores, "answers", lambda *_: pytest.fail("asked again"))
    assert samples.before(run_folder, given, given, rows(tmp_path / "there"), given) == expected
    assert samples.before(run_folder, given, given, [], given) == []


def test_scores_of_a_start_that_left_nothing_to_resume_are_measured_again(tmp_path: Path) -> None:
    (tmp_path / scores.SCORES_FILE).write_text('{"untrained": 0.5}')
    assert scores._kept(tmp_path) == {}
    (tmp_path / "checkpoint-2").mkdir()
    assert scores._kept(tmp_path) == {"untrained": 0.5}

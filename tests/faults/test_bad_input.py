"""What a user may get wrong, given to the recipes as a user gives it: one sentence, status 1, no stack trace.

Every case also checks that what was there before is still there, bit for bit.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qllava.training.callbacks import Progress
from qllava.training.main import main
from qllava.training.run import finetune, pretrain
from qllava.training.settings import parse
from tests.tiny_models import make_tiny_parts
from tests.tiny_runs import Tiny, flags, write_records

Refused = Callable[..., str]


@pytest.fixture
def refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Give a recipe a command line over the tiny parts; returns its one sentence."""

    def run(recipe: Any = finetune, *more: str, **fields: Any) -> str:
        start = {"projector": tiny.stage1} if recipe is finetune else {}
        line = flags(tiny, **{"output_dir": tmp_path / "run", **start, **fields})
        capsys.readouterr()
        assert main(recipe, lambda: parse([*line, *more], output_dir="unused", nano={})) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("qllava: ")]
        assert len(said) == 1 and err.rstrip().endswith(said[0]), err
        assert said[0].endswith((".", "?")) and len(said[0]) < 600
        return said[0]

    return run


def row(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    return {"id": "the-row", "image": "0.png", "conversations": turns, **changes}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one image that can be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "0.png")
    return folder


class TestRows:
    def refused_rows(self, refused: Refused, folder: Path, rows: list[Any], **fields: Any) -> str:
        message = refused(train_file=write_records(folder / "train.json", rows), **fields)
        assert "the-row" in message
        return message

    def test_an_image_that_is_missing(self, refused: Refused, images: Path) -> None:
        message = self.refused_rows(refused, images, [row(), row(image="1.png")])
        assert "1.png" in message and "train.json, example 2" in message

    @pytest.mark.parametrize("content", [b"no image", b""], ids=["text", "empty"])
    def test_an_image_that_is_none(self, refused: Refused, images: Path, content: bytes) -> None:
        (images / "1.png").write_bytes(content)
        message = self.refused_rows(refused, images, [row(image="1.png")])
        assert "1.png" in message and "not an image that can be read" in message

    def test_an_image_that_is_cut_off(self, refused: Refused, images: Path) -> None:
        Image.effect_noise((60, 60), 50).save(images / "1.png")
        whole = (images / "1.png").read_bytes()
        (images / "1.png").write_bytes(whole[: len(whole) // 2])
        message = self.refused_rows(refused, images, [row(image="1.png")])
        assert "1.png" in message and "cannot be decoded" in message

    def test_an_image_that_a_worker_process_meets(self, refused: Refused, images: Path) -> None:
        (images / "1.png").write_bytes(b"no image")
        message = self.refused_rows(refused, images, [row(image="1.png")], dataloader_num_workers=1, skip_check=True)
        assert message.startswith("qllava: id the-row: ") and "not an image that can be read" in message

    def test_a_row_that_is_no_conversation(self, refused: Refused, images: Path) -> None:
        assert "conversations" in self.refused_rows(refused, images, [{"id": "the-row", "caption": "red"}])

    def test_a_row_that_teaches_nothing(self, refused: Refused, images: Path) -> None:
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}]
        assert "ends with the user" in self.refused_rows(refused, images, [row(conversations=turns)])

    def test_a_row_that_is_too_long(self, refused: Refused, images: Path) -> None:
        assert "max_length 20" in self.refused_rows(refused, images, [row()], max_length=20)

    def test_held_out_rows_are_checked_too(self, refused: Refused, images: Path) -> None:
        path = write_records(images / "test.json", [row(image="gone.png")])
        assert "test.json, example 1" in refused(eval_file=path, eval_strategy="epoch")

    def test_every_row_dropped(self, refused: Refused, images: Path) -> None:
        path = write_records(images / "train.json", [row()])
        assert "No sample is left" in refused(train_file=path, max_length=20, too_long="drop")

    def test_no_such_file(self, refused: Refused, tmp_path: Path) -> None:
        assert "none.json" in refused(train_file=tmp_path / "none.json")

    def test_no_json(self, refused: Refused, images: Path) -> None:
        (images / "train.json").write_text("[{'id': 1}]", encoding="utf-8")
        assert "train.json, line 1" in refused(train_file=images / "train.json")


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("learning_rates: 1e-4", "'learning_rates'; did you mean learning_rate?"),
            ("image_dir: photos", "'image_dir'; did you mean image_folder?"),
            ("packing: true", "packing has no effect in qllava: qllava packs the samples itself"),
        ],
    )
    def test_a_key_of_the_yaml(self, refused: Refused, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        assert expected in refused(finetune, "--config", str(tmp_path / "recipe.yaml"))
        assert not (tmp_path / "run").exists()

    def test_a_template_of_another_model(self, refused: Refused) -> None:
        assert "<|start_header_id|>" in refused(template="llama_3") or "llama_3" in refused(template="llama_3")


class TestParts:
    @pytest.mark.parametrize("recipe", [pretrain, finetune])
    def test_a_folder_that_is_no_llama(self, refused: Refused, tiny: Tiny, recipe: Any) -> None:
        message = refused(recipe, language_model=tiny.tower)
        assert str(tiny.tower) in message and "clip_vision_model" in message and "LLaMA" in message

    def test_a_folder_that_is_not_there(self, refused: Refused, tmp_path: Path) -> None:
        assert str(tmp_path / "none") in refused(language_model=tmp_path / "none")

    def test_a_folder_that_is_no_tower(self, refused: Refused, tiny: Tiny) -> None:
        assert str(tiny.language_model) in refused(vision_tower=tiny.language_model)

    def test_a_folder_that_is_no_llava(self, refused: Refused, tiny: Tiny) -> None:
        given = {"language_model": None, "vision_tower": None, "projector": None}
        assert str(tiny.language_model) in refused(model_name_or_path=tiny.language_model, **given)

    def test_a_projector_whose_width_does_not_fit(self, refused: Refused, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.stage1, tmp_path / "stage1")
        path = tmp_path / "stage1" / "projector.safetensors"
        save_file({**load_file(path), "linear_1.weight": torch.zeros(64, 1024)}, path)
        message = refused(projector=tmp_path / "stage1")
        assert str(path) in message and "(64, 1024)" in message and "(64, 32)" in message

    def test_a_folder_without_a_projector(self, refused: Refused, tmp_path: Path) -> None:
        assert "give the folder of a pretrain_projector run" in refused(projector=tmp_path)

    def test_an_adapter_of_another_base(self, refused: Refused, tiny: Tiny, tmp_path: Path) -> None:
        """The run was interrupted, and other weights lie under the name of its base since."""
        (tmp_path / "parts").mkdir()
        language_model, _ = make_tiny_parts(tmp_path / "parts", seed=3)
        run = tmp_path / "run"
        shutil.copytree(tiny.stage2, run)
        (run / "results.json").unlink()
        before = {p: p.read_bytes() for p in (run / "checkpoint-4").iterdir()}
        message = refused(language_model=language_model)
        assert "checkpoint-4" in message and "another base" in message
        assert {p: p.read_bytes() for p in (run / "checkpoint-4").iterdir()} == before


class TestFolders:
    def test_a_finished_run_given_again(self, refused: Refused, tiny: Tiny) -> None:
        before = {p: p.stat().st_mtime_ns for p in tiny.stage2.rglob("*")}
        message = refused(output_dir=tiny.stage2)
        assert str(tiny.stage2) in message and "overwrite_output_dir" in message
        assert {p: p.stat().st_mtime_ns for p in tiny.stage2.rglob("*")} == before

    @pytest.mark.parametrize("recipe", [pretrain, finetune])
    def test_a_folder_that_cannot_be_written(self, refused: Refused, tmp_path: Path, recipe: Any) -> None:
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        for place in (tmp_path / "file", tmp_path / "file" / "run"):
            assert "cannot be written" in refused(recipe, output_dir=place)
        assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"

    def test_overwriting_takes_only_what_a_run_wrote(self, tiny: Tiny, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("mine", encoding="utf-8")
        line = flags(tiny, output_dir=tmp_path / "run", overwrite_output_dir="true", max_steps=1, save_strategy="no")
        assert main(pretrain, lambda: parse(line, output_dir="unused", nano={})) == 0
        assert (tmp_path / "run" / "mine.txt").read_text(encoding="utf-8") == "mine"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Call it, and no file may grow over so many bytes any more: what a full disk does, without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestAFullDisk:
    @pytest.mark.parametrize("step", [2, 4], ids=["checkpoint", "end"])
    def test_the_former_checkpoint_stays_and_the_run_can_be_continued(
        self,
        refused: Refused,
        small_files: Callable[[int], None],
        tiny: Tiny,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
    ) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        run = tmp_path / "run"
        before: dict[str, bytes] = {}

        def fill(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step and not before:
                kept = run / f"checkpoint-{step - 1 if step == 2 else step}"
                before.update({str(p): p.read_bytes() for p in kept.iterdir()})
                small_files(20_000)

        # The end comes after the last checkpoint.
        monkeypatch.setattr(Progress, "on_step_end" if step == 2 else "on_train_end", fill)
        try:
            message = refused(save_steps=1)
        finally:
            # Before pytest writes its next dot: its own output may be a file that is larger.
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
        assert "could not be saved" in message and "Free disk space" in message
        assert before and {name: Path(name).read_bytes() for name in before} == before
        assert not (run / "results.json").exists() and not (run / ".partial").exists()
        line = flags(tiny, output_dir=run, projector=tiny.stage1, save_steps=1)
        assert main(finetune, lambda: parse(line, output_dir="unused", nano={})) == 0
        assert json.loads((run / "results.json").read_text(encoding="utf-8"))["seconds"] >= 0

    def test_nan_is_said_as_plainly(
        self, refused: Refused, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(tiny.stage1, tmp_path / "stage1")
        path = tmp_path / "stage1" / "projector.safetensors"
        state = load_file(path)
        save_file({**state, "linear_1.bias": state["linear_1.bias"] * float("nan")}, path)
        message = refused(projector=tmp_path / "stage1")
        assert f"{path} cannot be used: linear_1.bias contains NaN or infinity" in message
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        assert not (tmp_path / "run" / "adapter_model.safetensors").exists()

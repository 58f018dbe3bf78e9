"""The first projector of a run: what is said of one that was trained on another base, and which is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qllava.config import NANO, NANO_IDENTITY, InputError
from qllava.models.adapter import save_projector
from qllava.models.assemble import Assembled, assemble
from qllava.models.outline import Recipe, outline
from qllava.models.record import read_record, save_record
from qllava.training import alignment
from qllava.training.run import finetune
from tests.tiny_runs import Tiny, refusal, settings, stage2_settings


def of_another_base(run: Path, folder: Path) -> Path:
    """Copy a run of stage 1; the record of the copy has another fingerprint."""
    shutil.copytree(run, folder)
    save_record(replace(read_record(folder), fingerprint="shapes-vocabulary-another"), folder)
    return folder


@pytest.fixture(scope="module")
def nano() -> Recipe:
    """Nano's parts, as a run of this version records them."""
    built = {"model": None, "language_model": NANO, "vision_tower": NANO, "projector_type": "mlp2x_gelu"}
    return outline(
        Recipe(**built, vision_feature_layer=-2, image_aspect="pad", template="chatml", load_in_4bit=True)  # type: ignore[arg-type]
    ).recipe


def test_a_projector_of_another_base_is_noted(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(stage2_settings(tiny, tmp_path / "same"))
    assert "was trained on another base" not in capsys.readouterr().out
    other = of_another_base(tiny.stage1, tmp_path / "other")
    finetune(stage2_settings(tiny, tmp_path / "run", projector=other))
    said = capsys.readouterr().out
    assert f"Note: the projector in {other} was trained on another base" in said and "shapes-vocabulary-another" in said


def test_identity_is_that_of_the_weights(nano: Recipe) -> None:
    """Whoever changes nano's weights changes this constant; else old runs would be taken for runs on them."""
    assert nano.fingerprint.rpartition("-")[2] == NANO_IDENTITY


def test_an_adapter_of_another_nano_is_refused(nano: Recipe) -> None:
    assert outline(nano).recipe == nano
    with pytest.raises(InputError) as caught:
        outline(replace(nano, fingerprint="shapes-vocabulary-another"))
    assert "another version of nano" in refusal(caught.value) and "make finetune ARGS=" in refusal(caught.value)


def test_another_layer_of_this_nano_is_another_base_and_no_other_nano(nano: Recipe) -> None:
    with pytest.raises(InputError, match="was trained on another base than nano \\(different config\\)"):
        outline(replace(nano, vision_feature_layer=-1))


def test_a_projector_of_another_nano_is_refused(nano: Recipe, tiny: Tiny, tmp_path: Path) -> None:
    assembled: Assembled = assemble(nano)
    for folder, recipe in ((tmp_path / "same", nano), (tmp_path / "other", replace(nano, fingerprint="a-b-other"))):
        folder.mkdir()
        save_projector(assembled.model, folder)
        save_record(recipe, folder)
    start = settings(tiny, tmp_path / "run", language_model=None, vision_tower=None, projector=tmp_path / "same")
    alignment.align(start, assembled, tmp_path / "run", None, {}, 0, started=None)  # type: ignore[arg-type]
    start.model.projector = str(tmp_path / "other")
    with pytest.raises(InputError) as caught:
        alignment.align(start, assembled, tmp_path / "run", None, {}, 0, started=None)  # type: ignore[arg-type]
    assert f"The projector in {tmp_path / 'other'} was trained on another version of nano" in refusal(caught.value)

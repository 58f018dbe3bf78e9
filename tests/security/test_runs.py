"""What a run leaves behind: no pickle in the result, no secret, and nothing that runs code when it is continued."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from qllava.config import InputError
from qllava.runs import MANIFEST_FILE
from qllava.training.durable.checkpoints import seal
from qllava.training.folders import write_settings
from qllava.training.run import finetune
from qllava.training.trainer import LlavaTrainer
from tests.security.test_models import Bomb
from tests.tiny_runs import Tiny, stage2_settings

# transformers' own state of optimizer, schedule and random numbers. What continues a run reads it with weights_only.
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}


def pickled(path: Path) -> bool:
    """Whether a file is a pickle, or an archive that holds one, as torch.save writes."""
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80":  # protocol 2 and later
        return True
    return zipfile.is_zipfile(path) and any(n.endswith(".pkl") for n in zipfile.ZipFile(path).namelist())


def test_a_pickle_is_recognized(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "new")
    torch.save({}, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("{}")
    assert [pickled(tmp_path / name) for name in ("new", "old", "text")] == [True, True, False]


def test_a_finished_run_holds_no_pickle(tiny: Tiny) -> None:
    """Checkpoints are not what is published: they hold transformers' own state beside the adapter."""
    for folder in (tiny.stage1, tiny.stage2):
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and pickled(path)}
        assert found and all(path.parts[0].startswith("checkpoint-") and path.name in STATE for path in found)


@pytest.mark.parametrize("name", sorted(STATE - {"scaler.pt"}))
def test_state_that_was_exchanged_runs_nothing(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of somebody else's, with a bomb in it and a manifest that fits the bomb."""
    folder, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(tiny.stage2, folder)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    place = folder / "checkpoint-2"
    begun = json.loads((place / MANIFEST_FILE).read_text())["begun_with"]
    torch.save({"state": Bomb(ran)}, place / name)
    (place / MANIFEST_FILE).unlink()
    seal(place, begun)
    steps: list[int] = []
    monkeypatch.setattr(LlavaTrainer, "training_step", lambda *_: steps.append(1))
    with pytest.raises(InputError, match="checkpoint-2 contains pickled objects, which qllava never loads"):
        finetune(stage2_settings(tiny, folder))
    assert not ran.exists() and not steps


def test_a_token_is_written_nowhere(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hub_token has no effect") as refused:
        stage2_settings(tiny, tmp_path, hub_token="hf_very_secret")
    assert "very_secret" not in str(refused.value)
    settings = stage2_settings(tiny, tmp_path)
    settings.train.hub_token = "hf_very_secret"  # as transformers itself may set it
    write_settings(settings, tmp_path)
    assert "very_secret" not in (tmp_path / "run.yaml").read_text()


def test_remote_code_cannot_be_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trust_remote_code has no effect in qllava: no remote code is run"):
        stage2_settings(tiny, tmp_path, trust_remote_code="true")

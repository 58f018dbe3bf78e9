"""How long a sample may be: what the language model reads, in check, a run and chat."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from qllava.config import InputError
from qllava.models.assemble import assemble
from qllava.models.outline import Recipe
from qllava.models.positions import positions_of
from qllava.models.reading import read_model
from qllava.training import data
from qllava.training.data import Part
from qllava.training.preview import Source, check_sources
from tests.tiny_models import make_tiny_llava, make_tiny_records
from tests.tiny_runs import refusal


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
        ),
    ],
)  # fmt: skip
def test_rope_scaling_is_reckoned_with(rope: dict[str, Any], expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_theta": 10000.0, **rope})
    assert positions_of(config) == expected
    assert positions_of(LlamaConfig(max_position_embeddings=4096)) == 4096


@pytest.mark.parametrize("policy", ["error", "drop", "trim"])
def test_a_sample_longer_than_the_model_reads(policy: str, tmp_path: Path) -> None:
    """max_length allows it, the model does not: check and run say so alike, before anything is trained."""
    rows = make_tiny_records(tmp_path, rows=4)
    folder = str(make_tiny_llava(tmp_path / "llava", context=60))
    assert read_model(folder).positions == 60
    parts = [Part(rows, None)]
    verdict = check_sources([Source(parts, read_model(folder), 100_000, policy)])

    assembled = assemble(Recipe(folder, None, None, "mlp2x_gelu", -2, "pad", "", False))
    settings: Any = SimpleNamespace(
        train=SimpleNamespace(max_length=100_000, seed=0, dataset_num_proc=None),
        data=SimpleNamespace(too_long=policy, skip_check=False),
    )

    def prepare() -> Any:
        return data.prepare_for(settings, assembled, assembled.template, parts, [])

    if policy == "error":
        assert not verdict.ok and verdict.errors > 0
        with pytest.raises(InputError, match="more than the 60 positions that the language model reads") as error:
            prepare()
        refusal(error.value)
        assert "raise max_length" not in str(error.value) and str(error.value).split(" There are")[0] in verdict.text()
    else:
        train, _ = prepare()
        assert len(train.lengths) > 0 and max(train.lengths) <= 60
        assert sum(part.summary.samples for part in train.parts) == len(train.lengths)

"""What is in a checkpoint, and whether a run can be resumed from it.

The weights are those that were learned: of a stage with LoRA the adapter, in which peft keeps the projector too, and
always the projector as a file of its own. The tokenizer, the image processor and the record of the base make the folder
one that `load_run` reads. transformers adds the state of the optimizer, the scheduler and the random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qllava.config import InputError
from qllava.models.adapter import refuse_not_finite, save_projector, save_record
from qllava.models.assemble import Assembled
from qllava.runs import ADAPTER_FILE, PROJECTOR_FILE
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import engine_of


@dataclass(frozen=True)
class Contents:
    """The learned weights of a stage as files."""

    assembled: Assembled
    """The model's parts, for its tokenizer and its record."""
    adapter: bool
    """Whether LoRA is trained besides the projector."""

    def write(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what `load_run` needs into a folder, which is made.

        Args:
            model: What was trained.
            folder: A checkpoint or a run.
            state: The model's weights, where they have been gathered from several processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter:
            model.save_pretrained(str(folder), state_dict=state)
            (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody filled in
        save_projector(model, folder, state)
        self.assembled.processor.save_pretrained(str(folder))
        save_record(self.assembled.recipe, folder)

    def load_projector(self, model: Any, checkpoint: Path) -> None:
        """Put the projector of a checkpoint into a model without an adapter; transformers does not know of it."""
        model.model.multi_modal_projector.load_state_dict(load_file(checkpoint / PROJECTOR_FILE))

    def check(self, checkpoint: Path, engine: str) -> None:
        """Check that an intact checkpoint can be resumed from here, before anything of it is loaded.

        Args:
            checkpoint: The checkpoint.
            engine: "FSDP" or "DeepSpeed" where one of them saves the optimizer's state here; "" otherwise.

        Raises:
            InputError: Another engine has saved the optimizer's state (each has a form of its own, and transformers
                would begin with an empty one), or a weight is not finite.
        """
        before, count = engine_of(checkpoint)
        if before != engine:
            saved = f"under {before}" if before else "without FSDP and DeepSpeed"
            here = f"under {engine}" if engine else "without them"
            raise InputError(
                f"{checkpoint} was saved {saved}, and this process runs {here}. The optimizer's state has a different "
                f"format there; resume {saved}."
            )
        if before == "DeepSpeed" and count != processes.share()[1]:
            raise InputError(
                f"{checkpoint} was saved by {count} processes under DeepSpeed. Resume it with {count} processes."
            )
        path = checkpoint / (ADAPTER_FILE if self.adapter else PROJECTOR_FILE)
        hint = f"remove {checkpoint}, and the same command resumes from the checkpoint before it"
        refuse_not_finite(load_file(path), path, hint)

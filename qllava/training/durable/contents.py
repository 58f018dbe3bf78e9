"""Contents of a checkpoint, and whether a run can be resumed from it.

The weights are the trained ones: in a stage with LoRA the adapter, in which peft includes the projector, and in every
stage the projector as a separate file. With the tokenizer, the image processor and the record of the base, `load_run`
can read the folder. transformers adds the state of the optimizer, the scheduler and the random numbers.
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
    """The trained weights of a stage as files."""

    assembled: Assembled
    """The model's parts, for its tokenizer and its record."""
    adapter: bool
    """Whether LoRA is trained besides the projector."""

    def write(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what `load_run` needs into a folder, which is created.

        Args:
            model: The model that was trained.
            folder: Folder of a checkpoint or a run.
            state: Weights of the model, if they were gathered from several ranks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter:
            model.save_pretrained(str(folder), state_dict=state)
            (folder / "README.md").unlink(missing_ok=True)  # peft's template, which nobody filled in
        save_projector(model, folder, state)
        self.assembled.processor.save_pretrained(str(folder))
        save_record(self.assembled.recipe, folder)

    def load_projector(self, model: Any, checkpoint: Path) -> None:
        """Load the projector of a checkpoint into a model without an adapter, which transformers cannot do."""
        model.model.multi_modal_projector.load_state_dict(load_file(checkpoint / PROJECTOR_FILE))

    def check(self, checkpoint: Path, engine: str) -> None:
        """Check that an intact checkpoint can be resumed from here, before anything of it is loaded.

        Args:
            checkpoint: The checkpoint.
            engine: "FSDP" or "DeepSpeed" if one of them saves the optimizer's state in this run; "" otherwise.

        Raises:
            InputError: Another engine saved the optimizer's state (each has its own format, and transformers would
                start with an empty state), or a weight is not finite.
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

"""`load`: from the name that a user types to a `Chat`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from qllava.config import InputError, expanded
from qllava.inference.chat import Chat
from qllava.models.threads import settle_threads

RUNS = Path("runs")


def load(
    model: str,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = None,
    base_model: str | Path | Sequence[str | Path] = (),
) -> Chat:
    """Load `nano` (the newest finished nano run in ./runs), a merged folder, a run folder, or a hub name.

    fp32 on the CPU, bf16 on CUDA (fp16 where the card has no bf16), or `dtype` by its name in torch; `load_in_4bit`
    keeps the language model in NF4. Neither changes a run folder: it is its base, exactly as it was trained (in 4 bit
    if it was), plus the adapter; `base_model` says where the parts of its base are now, if they have moved.

    Raises InputError when there is no such model, or its base is another one.
    """
    folder = newest_nano_run() if model == "nano" else Path(expanded(model))
    if (folder / "adapter_config.json").is_file():
        from qllava.models.adapter import load_run

        network, processor = load_run(folder, [base_model] if isinstance(base_model, str | Path) else base_model)
        settle_threads(network)
        return Chat(network.eval(), processor, str(folder))
    if base_model:
        raise InputError(f"{model} is no run with an adapter, so it has no base elsewhere; leave --base-model out.")
    if (folder / "run.yaml").is_file():
        raise InputError(f"{folder} is a run that has not finished; give its command again to continue it.")
    from qllava.models.assemble import nf4
    from qllava.models.checkpoint import load_llava
    from qllava.models.outline import compute_dtype

    cuda = torch.cuda.is_available()
    compute: torch.dtype = getattr(torch, dtype) if dtype else compute_dtype()
    network, processor = load_llava(
        str(folder) if folder.is_dir() else model,
        dtype=compute,
        quantization_config=nf4(compute) if load_in_4bit else None,
        device_map={"": "cuda:0"} if cuda else None,
    )
    settle_threads(network)
    return Chat(network.eval(), processor, model)


def has_base(model: str) -> bool:
    """Whether a name means a run, whose base may be elsewhere."""
    folder = newest_nano_run() if model == "nano" else Path(expanded(model))
    return (folder / "adapter_config.json").is_file()


def same_model(first: str, second: str) -> bool:
    """Whether two names mean one model: `nano`, say, and the folder of its newest run."""
    folders = [newest_nano_run() if name == "nano" else Path(expanded(name)) for name in (first, second)]
    return first == second or (all(path.is_dir() for path in folders) and folders[0].samefile(folders[1]))


def newest_nano_run(runs: Path = RUNS) -> Path:
    """The folder of the nano run that finished last. Raises InputError when there is none."""
    finished = finished_nano_runs(runs)
    if not finished:
        raise InputError(f"There is no finished nano run in {runs}/ yet; run `make finetune` first.")
    return finished[-1]


def finished_nano_runs(runs: Path = RUNS) -> list[Path]:
    """Return the folders of finished nano runs, the one that finished last at the end.

    Raises:
        InputError: The settings of a finished run cannot be read.
    """
    finished = [
        folder
        for folder in runs.glob("*/")
        if (folder / "results.json").is_file()
        and (folder / "adapter_model.safetensors").is_file()
        and (folder / "run.yaml").is_file()
        and _is_nano(folder / "run.yaml")
    ]
    return sorted(finished, key=lambda folder: (folder / "results.json").stat().st_mtime)


def _is_nano(path: Path) -> bool:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())}); repair or remove the run."
        ) from error
    return isinstance(settings, dict) and settings.get("model_name_or_path") == "nano"

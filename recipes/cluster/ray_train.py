"""A recipe on a Ray cluster: each worker of Ray Train runs it; flags that are not of this file go to the recipe.

    ray job submit --working-dir . -- python recipes/cluster/ray_train.py --workers 4 --shared /shared/ray \
        --config recipes/llava15_7b_8gb.yaml --train_file mine.json --output_dir /shared/runs/mine

Run `pip install 'ray[train]'` on every node, and put output_dir and data on a disk that all of them see. If a worker or
its machine is lost, Ray restarts all workers, and the same command resumes from the newest intact checkpoint. Ray runs
the function in a thread, where Python cannot handle signals: steps since the last checkpoint are computed again, so
choose `save_steps` accordingly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qllava.surroundings import prepare_process


def work(config: dict[str, Any]) -> None:
    """Run `recipes/finetune_lora.py` with these arguments in a worker.

    Ray has set RANK, WORLD_SIZE and the other variables of torch.distributed.

    Raises:
        RuntimeError: The recipe failed.
    """
    from qllava.training.options.begin import finetune

    status = finetune(config["words"])
    if status:
        raise RuntimeError(f"The recipe ended with status {status}; see its message above.")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of this file's flags; all others belong to the recipe."""
    parser = argparse.ArgumentParser(description="Run finetune_lora on a Ray cluster.", allow_abbrev=False)
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="number of processes, with one GPU each (default: 1)"
    )
    parser.add_argument("--cpu", action="store_true", help="run without GPUs")
    parser.add_argument(
        "--failures", metavar="N", type=int, default=3, help="maximum number of restarts after a failure (default: 3)"
    )
    parser.add_argument("--shared", metavar="DIR", type=Path, help="folder for Ray's own files, shared by all nodes")
    return parser


def launch(arguments: Sequence[str] | None = None) -> None:
    """Start the workers and wait for them; Ray raises TrainingFailedError if they fail too often."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    own, words = command_line().parse_known_args(sys.argv[1:] if arguments is None else arguments)
    TorchTrainer(
        work,
        train_loop_config={"words": words},
        scaling_config=ScalingConfig(num_workers=own.workers, use_gpu=not own.cpu),
        run_config=RunConfig(
            name="qllava",
            storage_path=str(own.shared.absolute()) if own.shared else None,
            failure_config=FailureConfig(max_failures=own.failures),
        ),
    ).fit()


if __name__ == "__main__":
    prepare_process()
    launch()

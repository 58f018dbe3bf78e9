"""Checks of a run's settings before torch is imported: combinations of values, packages, files, folders.

The checks create and change no files. A mistake costs the user a fraction of a second instead of a model load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qllava.arguments import check_data, check_file, check_folder, check_part, check_written_folder, missing
from qllava.config import InputError, expanded
from qllava.locks import refuse_held
from qllava.models.record import adapter_at
from qllava.runs import PROJECTOR_FILE, RESULTS_FILE, RUN_FILE, Run
from qllava.training.options.command import Given
from qllava.training.options.sizes import check_bytes
from qllava.training.options.table import FOLLOWING

# Values of `report_to`, with groups of modules (one module of each group is needed) and the packages to install.
TRACKERS: Mapping[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "azure_ml": ((("azureml.core.run",),), "azureml-sdk"),
    "clearml": ((("clearml",),), "clearml"),
    "codecarbon": ((("codecarbon",),), "codecarbon"),
    "comet_ml": ((("comet_ml",),), "comet-ml"),
    "dagshub": ((("dagshub",), ("mlflow",)), "dagshub mlflow"),
    "dvclive": ((("dvclive",),), "dvclive"),
    "flyte": ((("flytekit",),), "flytekit"),
    "kubeflow": ((), ""),  # an environment variable of its trainer's
    "mlflow": ((("mlflow",),), "mlflow"),
    "neptune": ((("neptune",),), "neptune"),
    "swanlab": ((("swanlab",),), "swanlab"),
    "tensorboard": ((("tensorboard", "tensorboardX"),), "tensorboard"),
    "trackio": ((("trackio",),), "trackio"),
    "wandb": ((("wandb",),), "wandb"),
}

_WHOLE_LAYERS = "it works on whole weight matrices, and here only LoRA and the projector are trained"
_REFUSED_OPTIMIZERS = ("galore_", "apollo_", "lomo", "adalomo")
# Prefix of `optim`, with the module that it needs and the package to install.
_OPTIMIZERS = (
    (("adamw_torch_xla",), "torch_xla", "torch_xla"),
    (("adamw_torch_npu_fused",), "torch_npu", "torch_npu"),
    (("adamw_anyprecision",), "torchdistx", "torchdistx"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free_",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("adamw_bnb_", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"), "bitsandbytes", "bitsandbytes"),
)
_READ_OPTIM_ARGS = ("adamw_anyprecision", "ademamix", "paged_ademamix", "sgd", "adagrad", "rmsprop")

# Keys of `optim_args` that these optimizers read; transformers silently ignores all others.
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_OF_WORKERS = tuple(
    f"dataloader_{name}" for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context")
)

IN_USE = "wait until it ends, end it, or choose another output_dir"
"""Advice when another run uses the same folder."""

EXACT_MATCH = "eval_exact_match"
METRICS = ("eval_loss", EXACT_MATCH, "eval_mean_token_accuracy", "eval_entropy")
"""Metrics that an evaluation reports; transformers accepts each name without `eval_` too."""

# Schedulers that need one of these keys in lr_scheduler_kwargs.
_NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def look(given: Given, *, stage1: bool) -> None:
    """Check everything that a command line names.

    Args:
        given: The command line.
        stage1: Whether the recipe is pretrain_projector; otherwise it is finetune_lora.

    Raises:
        InputError: For the first invalid setting.
    """
    _check_loop(given)
    _check_scheduler(given)
    _check_metric(given, stage1=stage1)
    _check_packages(given)
    _check_parts(given, stage1=stage1)
    _check_data(given)
    _check_start(given, stage1=stage1)
    check_output(given)
    check_written_folder(str(given.get("output_dir")), "output_dir")
    if os.environ.get("WORLD_SIZE", "1") == "1":  # with several processes, rank 0 may have started already
        refuse_held(Path(expanded(str(given.get("output_dir")))), IN_USE)


def _check_loop(given: Given) -> None:
    """Check numbers and strategies that exclude each other."""
    both = {"max_steps", "num_train_epochs"} & given.values.keys()
    # `--max_steps` on the command line may override a preset, for a trial run.
    together = both <= given.flags or not both & given.flags
    if len(both) == 2 and together and given.get("max_steps") > 0:
        raise InputError(
            "max_steps and num_train_epochs are both set, and num_train_epochs would be ignored. Remove one of them."
        )
    if (limit := given.get("fit_memory")) is not None:
        check_bytes(limit, "fit_memory")
    if given.get("bf16") and given.get("fp16"):
        raise InputError("bf16 and fp16 are both set. Keep one of them (bf16 if the GPU supports it).")
    if not given.get("dataloader_num_workers"):
        for name in _OF_WORKERS:
            if given.get(name):
                raise InputError(f"{name} needs data loader workers. Set dataloader_num_workers, or remove {name}.")
    for what in ("logging", "eval", "save"):
        steps = given.get(f"{what}_steps")
        if steps is not None and steps > 1 and steps != int(steps):
            raise InputError(f"{what}_steps is {steps}. Give a whole number, or a fraction of all steps below 1.")
    if given.get("save_strategy") == "best" and (
        given.get("eval_strategy") == "no" or not given.get("metric_for_best_model")
    ):
        raise InputError(
            "save_strategy best needs eval_strategy and metric_for_best_model. Set both (steps and eval_loss)."
        )


def _check_scheduler(given: Given) -> None:
    """Check that a scheduler has the arguments and the evaluations that it needs."""
    name, arguments = given.get("lr_scheduler_type"), given.get("lr_scheduler_kwargs")
    needed = _NEEDED.get(name)
    if needed and not set(needed) & (arguments or {}).keys():
        example = {needed[0]: 1e-6 if needed[0] == "min_lr" else 100}
        raise InputError(
            f"lr_scheduler_type {name} needs lr_scheduler_kwargs with {' or '.join(needed)}, such as {example}."
        )
    if arguments and name in ("constant", "constant_with_warmup"):
        raise InputError(
            f"lr_scheduler_kwargs has no effect with lr_scheduler_type {name}. Remove lr_scheduler_kwargs."
        )
    if name in FOLLOWING and (given.get("eval_strategy") == "no" or not _held_out(given)):
        raise InputError(f"lr_scheduler_type {name} needs the held-out loss. Set eval_strategy and eval_file too.")


def _check_metric(given: Given, *, stage1: bool) -> None:
    """Raise InputError if an evaluation does not report metric_for_best_model."""
    name = given.get("metric_for_best_model")
    reported = [one for one in METRICS if one != EXACT_MATCH or (given.get("eval_questions") and not stage1)]
    if name is None or f"eval_{name.removeprefix('eval_')}" in reported:
        return
    why = ""
    if name.removeprefix("eval_") == EXACT_MATCH.removeprefix("eval_"):
        why = ", because stage 1 answers no questions" if stage1 else ", because eval_questions is 0"
    raise InputError(
        f"metric_for_best_model is {name!r}, which is not reported{why}. Choose one of {', '.join(reported)}."
    )


def _held_out(given: Given) -> bool:
    return bool(given.get("eval_file") or (given.is_nano and not given.get("train_file")))


def _check_packages(given: Given) -> None:
    """Check that the packages that trackers, optimizers and engines need are installed."""
    trackers = given.get("report_to")
    for tracker in trackers if isinstance(trackers, list) else [trackers]:
        if tracker in ("none", "all", None):
            continue
        if tracker not in TRACKERS:
            raise InputError(f"report_to is {tracker!r}. It must be one of none, all, {', '.join(TRACKERS)}.")
        groups, install = TRACKERS[tracker]
        if any(len(missing(group)) == len(group) for group in groups):
            raise InputError(
                f"report_to {tracker} needs a package that is not installed. Install it with pip install {install}."
            )
        if tracker == "kubeflow" and not os.environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
            raise InputError(
                "report_to kubeflow works only in a job of Kubeflow's trainer. Remove report_to, or start such a job."
            )
    optim = given.get("optim")
    if optim.startswith(_REFUSED_OPTIMIZERS):
        raise InputError(f"optim {optim} has no effect in qllava: {_WHOLE_LAYERS}. Remove optim.")
    for names, module, install in _OPTIMIZERS:
        if optim.startswith(names) and missing([module]):
            raise InputError(
                f"optim {optim} needs a package that is not installed. Install it with pip install {install}."
            )
    if given.get("optim_args") and not optim.startswith(_READ_OPTIM_ARGS):
        raise InputError(f"optim_args has no effect with optim {optim}. Remove optim_args.")
    for pair in (given.get("optim_args") or "").split(",") if optim in _OPTIM_ARGS else ():
        key = pair.partition("=")[0].strip()
        if key and key not in _OPTIM_ARGS[optim]:
            raise InputError(f"optim_args has the key {key}, which optim {optim} does not read. Known keys: "
                             f"{', '.join(_OPTIM_ARGS[optim])}.")  # fmt: skip
    if given.get("deepspeed") and missing(["deepspeed"]):
        raise InputError("deepspeed needs a package that is not installed. Install it with pip install deepspeed.")


def _check_parts(given: Given, *, stage1: bool) -> None:
    """Check that the folders of models and projector exist and hold the expected files."""
    for name in ("model_name_or_path", "language_model", "vision_tower"):
        value = given.get(name)
        if value:
            check_part(value, name)
    for base in given.get("base_model") or ():
        check_part(base, "base_model")
    if not stage1 and given.get("lora_r") < 1:
        raise InputError("lora_r is 0, so the language model would not be trained. Give at least 1.")
    projector = given.get("projector")
    if projector:
        check_folder(projector, "projector")
        if not (Path(projector) / PROJECTOR_FILE).is_file():
            from qllava.models.layouts import projector_advice  # imported here, because only the error message needs it

            raise InputError(f"projector: {projector} has no {PROJECTOR_FILE}; {projector_advice(Path(projector))}.")


def _check_start(given: Given, *, stage1: bool) -> None:
    """Raise InputError if the settings do not determine the model or the initial projector."""
    name, projector, captions = (given.get(one) for one in ("model_name_or_path", "projector", "pretrain_file"))
    parts = [given.get(one) for one in ("language_model", "vision_tower")]
    if name and any(parts):
        raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
    if any(parts) and not all(parts):
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    start = adapter_at(name)
    if given.get("base_model") and not start:
        raise InputError(
            "base_model is the new location of a run's base, and model_name_or_path is not a run. Remove base_model."
        )
    if stage1:
        for setting, value in (("projector", projector), ("pretrain_file", captions)):
            if value:
                raise InputError(
                    f"{setting} is a setting of finetune_lora. Stage 1 learns from train_file; remove {setting}."
                )
        if start:
            raise InputError(
                f"{start} is an adapter whose projector is already trained. Train it further with finetune_lora."
            )
    elif start and (projector or captions):
        raise InputError(
            f"The adapter in {start} contains a projector. Remove projector and pretrain_file, or start from the base."
        )
    elif projector and captions:
        raise InputError("Both projector and pretrain_file are set. Remove one of the two settings.")
    elif any(parts) and not (projector or captions):
        raise InputError(
            "A new LLaVA needs a trained projector. Set projector (the folder of a pretrain_projector run) or "
            "pretrain_file (captions to train a projector with)."
        )


def _check_data(given: Given) -> None:
    """Check that data files, image folders and engine configurations exist."""
    for name in ("train_file", "eval_file", "pretrain_file"):
        value = given.get(name)
        for part in value if isinstance(value, list) else [value]:
            path = part.get("path") if isinstance(part, dict) else part
            folder = part.get("image_folder") if isinstance(part, dict) else None
            if isinstance(path, str):
                check_data(path, name)
            if isinstance(folder, str):
                check_folder(folder, f"{name}, image_folder")
    if given.get("image_folder"):
        check_folder(given.get("image_folder"), "image_folder")
    if isinstance(given.get("deepspeed"), str):
        check_file(given.get("deepspeed"), "deepspeed")
    if not given.is_nano and not given.get("train_file"):
        raise InputError("The setting train_file is missing. Give a file of examples (only nano has default data).")


def check_output(given: Given | Mapping[str, Any]) -> None:
    """Raise InputError if output_dir holds a finished run, or the model or projector that the run starts from.

    Args:
        given: The settings output_dir, overwrite_output_dir, model_name_or_path and projector.
    """
    folder = Path(expanded(str(given.get("output_dir"))))
    for name in ("model_name_or_path", "projector"):
        value = given.get(name)
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{value} is inside output_dir, which is {folder}. Choose another output_dir.")
    if Run(folder).finished:
        if not given.get("overwrite_output_dir"):
            raise InputError(
                f"{folder} contains a finished run. Choose another output_dir, or set overwrite_output_dir."
            )
        if not (folder / RUN_FILE).is_file():
            raise InputError(f"{folder} is not a run: it has {RESULTS_FILE}, but no {RUN_FILE}. Choose another folder.")

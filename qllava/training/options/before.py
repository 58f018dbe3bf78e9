"""What a run's settings name, looked at before torch is imported: values together, packages, files, folders.

Nothing is made and nothing changed here. What is wrong costs the user a fraction of a second in place of a model load.
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

# For `report_to`: groups of modules (it needs one of each), and what to install.
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
# Beginnings of `optim`, the module it needs, and what to install.
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

# Keys that these optimizers read of `optim_args`; transformers drops any other without a word.
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_OF_WORKERS = tuple(
    f"dataloader_{name}" for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context")
)

IN_USE = "wait until it ends, end it, or choose another output_dir"
"""What can be done about another run in the same folder."""

EXACT_MATCH = "eval_exact_match"
METRICS = ("eval_loss", EXACT_MATCH, "eval_mean_token_accuracy", "eval_entropy")
"""What an evaluation reports and a run may be judged by; transformers takes each without `eval_` too."""

# Schedulers that need an argument: one of these has to be given.
_NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def look(given: Given, *, stage1: bool) -> None:
    """Look at everything that a command line names.

    Args:
        given: The command line.
        stage1: Whether it is one of pretrain_projector, and not of finetune_lora.

    Raises:
        InputError: For the first thing that is wrong, in one sentence.
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
    if os.environ.get("WORLD_SIZE", "1") == "1":  # of several processes the first may have begun already
        refuse_held(Path(expanded(str(given.get("output_dir")))), IN_USE)


def _check_loop(given: Given) -> None:
    """Numbers and strategies that exclude each other."""
    both = {"max_steps", "num_train_epochs"} & given.values.keys()
    # A flag over a preset is how one tries a preset out.
    together = both <= given.flags or not both & given.flags
    if len(both) == 2 and together and given.get("max_steps") > 0:
        raise InputError("max_steps and num_train_epochs are both set, and max_steps alone would count; remove one.")
    if (limit := given.get("fit_memory")) is not None:
        check_bytes(limit, "fit_memory")
    if given.get("bf16") and given.get("fp16"):
        raise InputError("bf16 and fp16 are both set; keep one (bf16 where the GPU has it).")
    if not given.get("dataloader_num_workers"):
        for name in _OF_WORKERS:
            if given.get(name):
                raise InputError(f"{name} needs workers; set dataloader_num_workers, or remove it.")
    for what in ("logging", "eval", "save"):
        steps = given.get(f"{what}_steps")
        if steps is not None and steps > 1 and steps != int(steps):
            raise InputError(f"{what}_steps is {steps}; give a whole number, or a share of all steps below 1.")
    if given.get("save_strategy") == "best" and (
        given.get("eval_strategy") == "no" or not given.get("metric_for_best_model")
    ):
        raise InputError("save_strategy best needs eval_strategy and metric_for_best_model (eval_loss, for one).")


def _check_scheduler(given: Given) -> None:
    """A scheduler has the arguments and the evaluations that it needs."""
    name, arguments = given.get("lr_scheduler_type"), given.get("lr_scheduler_kwargs")
    needed = _NEEDED.get(name)
    if needed and not set(needed) & (arguments or {}).keys():
        example = {needed[0]: 1e-6 if needed[0] == "min_lr" else 100}
        raise InputError(
            f"lr_scheduler_type {name} needs lr_scheduler_kwargs with {' or '.join(needed)}, such as {example}."
        )
    if arguments and name in ("constant", "constant_with_warmup"):
        raise InputError(f"lr_scheduler_kwargs has no effect with lr_scheduler_type {name}; remove it.")
    if name in FOLLOWING and (given.get("eval_strategy") == "no" or not _held_out(given)):
        raise InputError(f"lr_scheduler_type {name} follows the held-out loss: set eval_strategy and eval_file too.")


def _check_metric(given: Given, *, stage1: bool) -> None:
    """Raise InputError for a metric_for_best_model that an evaluation does not report."""
    name = given.get("metric_for_best_model")
    reported = [one for one in METRICS if one != EXACT_MATCH or (given.get("eval_questions") and not stage1)]
    if name is None or f"eval_{name.removeprefix('eval_')}" in reported:
        return
    why = ""
    if name.removeprefix("eval_") == EXACT_MATCH.removeprefix("eval_"):
        why = ", because stage 1 answers no questions" if stage1 else ", because eval_questions is 0"
    raise InputError(f"metric_for_best_model is {name!r}, which is not reported{why}; choose {', '.join(reported)}.")


def _held_out(given: Given) -> bool:
    return bool(given.get("eval_file") or (given.is_nano and not given.get("train_file")))


def _check_packages(given: Given) -> None:
    """What trackers, optimizers and engines need is installed."""
    trackers = given.get("report_to")
    for tracker in trackers if isinstance(trackers, list) else [trackers]:
        if tracker in ("none", "all", None):
            continue
        if tracker not in TRACKERS:
            raise InputError(f"report_to is {tracker!r}; possible are none, all, {', '.join(TRACKERS)}.")
        groups, install = TRACKERS[tracker]
        if any(len(missing(group)) == len(group) for group in groups):
            raise InputError(f"report_to {tracker} needs a package that is not installed: pip install {install}.")
        if tracker == "kubeflow" and not os.environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
            raise InputError("report_to kubeflow is for a job of Kubeflow's trainer, and this is none; remove it.")
    optim = given.get("optim")
    if optim.startswith(_REFUSED_OPTIMIZERS):
        raise InputError(f"optim {optim} has no effect in qllava: {_WHOLE_LAYERS}; remove it.")
    for names, module, install in _OPTIMIZERS:
        if optim.startswith(names) and missing([module]):
            raise InputError(f"optim {optim} needs a package that is not installed: pip install {install}.")
    if given.get("optim_args") and not optim.startswith(_READ_OPTIM_ARGS):
        raise InputError(f"optim_args has no effect with optim {optim}; remove it.")
    for pair in (given.get("optim_args") or "").split(",") if optim in _OPTIM_ARGS else ():
        key = pair.partition("=")[0].strip()
        if key and key not in _OPTIM_ARGS[optim]:
            raise InputError(f"optim_args has {key}, which optim {optim} does not read; possible are "
                             f"{', '.join(_OPTIM_ARGS[optim])}.")  # fmt: skip
    if given.get("deepspeed") and missing(["deepspeed"]):
        raise InputError("deepspeed needs a package that is not installed: pip install deepspeed.")


def _check_parts(given: Given, *, stage1: bool) -> None:
    """Models and projector are there, as far as a folder says."""
    for name in ("model_name_or_path", "language_model", "vision_tower"):
        value = given.get(name)
        if value:
            check_part(value, name)
    for base in given.get("base_model") or ():
        check_part(base, "base_model")
    if not stage1 and given.get("lora_r") < 1:
        raise InputError("lora_r is 0, so that nothing of the language model would be trained; give at least 1.")
    projector = given.get("projector")
    if projector:
        check_folder(projector, "projector")
        if not (Path(projector) / PROJECTOR_FILE).is_file():
            from qllava.models.layouts import projector_advice  # here, because only a mistake needs it

            raise InputError(f"projector: {projector} has no {PROJECTOR_FILE}; {projector_advice(Path(projector))}.")


def _check_start(given: Given, *, stage1: bool) -> None:
    """Raise InputError where it is unclear what the model is, or where its projector begins."""
    name, projector, captions = (given.get(one) for one in ("model_name_or_path", "projector", "pretrain_file"))
    parts = [given.get(one) for one in ("language_model", "vision_tower")]
    if name and any(parts):
        raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
    if any(parts) and not all(parts):
        raise InputError("A new LLaVA needs both language_model and vision_tower; give both, or model_name_or_path.")
    start = adapter_at(name)
    if given.get("base_model") and not start:
        raise InputError("base_model says where the base of a run is that is trained on; no run is given, remove it.")
    if stage1:
        for setting, value in (("projector", projector), ("pretrain_file", captions)):
            if value:
                raise InputError(f"{setting} is of finetune_lora; stage 1 learns from train_file, remove it.")
        if start:
            raise InputError(f"{start} is an adapter, whose projector has learned; train it on with finetune_lora.")
    elif start and (projector or captions):
        raise InputError(
            f"The adapter in {start} brings its own projector; leave projector and pretrain_file out, or start from "
            "the base."
        )
    elif projector and captions:
        raise InputError("The projector is either given or learned from pretrain_file; remove one of the two settings.")
    elif any(parts) and not (projector or captions):
        raise InputError(
            "A new LLaVA's projector has learned nothing yet: give projector (the folder that pretrain_projector "
            "wrote) or pretrain_file."
        )


def _check_data(given: Given) -> None:
    """Files of data, the images' folder and configurations of engines are there."""
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
        raise InputError("The setting train_file is missing: give a file of examples (nano alone brings its own).")


def check_output(given: Given | Mapping[str, Any]) -> None:
    """Raise InputError when the run's folder is finished, or holds what the run is made from.

    Args:
        given: The settings output_dir, overwrite_output_dir, model_name_or_path and projector.
    """
    folder = Path(expanded(str(given.get("output_dir"))))
    for name in ("model_name_or_path", "projector"):
        value = given.get(name)
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{value} is inside output_dir, which is {folder}; choose another output_dir.")
    if Run(folder).finished:
        if not given.get("overwrite_output_dir"):
            raise InputError(f"{folder} holds a finished run; choose another output_dir, or set overwrite_output_dir.")
        if not (folder / RUN_FILE).is_file():
            raise InputError(
                f"{folder} is not a run: it has {RESULTS_FILE}, but {RUN_FILE} is missing; choose another folder."
            )

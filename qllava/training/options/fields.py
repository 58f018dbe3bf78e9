"""Every setting of a recipe by name: its type, its default, what it may be, and whether a resumed run may change it.

TRL's `SFTConfig` has over a hundred fields, and importing it takes seconds. They are written down here, so that a
command line is checked, and explained by `--help`, before torch is imported. A contract test compares the table with
the TRL that is installed; a field that a new release adds, or changes, fails it by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qllava.config import DataConfig, LoopConfig, ModelConfig

Kind = Literal["int", "float", "bool", "switch", "str", "choice", "list", "dict", "object"]


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    """As a flag and as a key of the YAML."""
    kind: Kind
    """`switch` is a bool whose flag needs a value (unset, something else decides); `dict` a mapping, or its JSON."""
    default: Any
    """TRL's for a field of TRL's, ours for one of ours."""
    refused: str = ""
    """Why a value other than the default would have no effect; empty where it has one."""
    free: bool = False
    """Whether a run that is resumed may have another value: it does not decide what is learned."""
    choices: tuple[str, ...] = ()
    """The values that are possible; empty for any."""
    help: str = ""
    """One sentence; TRL documents its own fields."""


def _decides(name: str, kind: Kind, default: Any, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, choices=choices)


def _free(name: str, kind: Kind, default: Any, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, free=True, choices=choices)


def _refused(name: str, kind: Kind, default: Any, reason: str, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, refused=reason, free=True, choices=choices)


_PACKS = "qllava packs the samples itself, images included"
_ANSWERS = "answers alone are learned, always"
_SMALL = "only LoRA and the projector are trained, and they need no optimizer for parts of a layer"
_EVAL_TYPE = "held-out examples are computed in the type that training computes in"
_COMPILE = "packs differ in length, and the whole model would be compiled again for each; see `compile_layers`"
_LIGER = "logits are computed for learned tokens only, by code of qllava's that liger's kernel would replace"
_PREDICTIONS = "an evaluation computes the loss and answers questions, and keeps no predictions"
_HUB = "nothing is published while it is being trained; upload the finished run's folder, or what `qllava merge` wrote"
_SCRIPTS = "it is for transformers' example scripts; `eval_strategy` says when a run is evaluated"
_SEEN = "the tokens that were seen are logged as num_tokens, always"
_EACH_LOSS = "the loss of a step is the mean over the learned tokens of all processes"
_NOISE = "its noise is scaled by the length of one sample, and a pack holds several"
_HALVED = "when memory runs out packs are halved, and the samples of a step stay the same"
_LAST = "the last weights are the result; every checkpoint can be merged instead"
_WHOLE = "a checkpoint holds and restores everything that it takes to resume"
_PYTHON = "it is an object that only Python can make; `accelerate launch` takes the same as flags"
_ORDERED = "the samples of a step would depend on which worker is the fastest"
_FSDP = (
    "the language model is packed into 4 bits before transformers reads it, so give accelerate the settings of FSDP: "
    "accelerate launch --config_file recipes/accelerate/fsdp2_qlora.yaml"
)
_ORDER = "samples about one image come together, in an order that the seed draws"
_ENCODED = "qllava chooses how many processes encode the data, by the machine's cores"

_WHEN = ("no", "steps", "epoch")
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
FOLLOWING = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that change the learning rate at evaluations alone."""
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor"),
    *("adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit"),
    *("adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb"),
    *("rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo"),
    *("grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw"),
    *("apollo_adamw_layerwise", "stable_adamw"),
)

# In the order of TRL's own `--help`. What is refused may not differ from its default.
TRL: tuple[Field, ...] = (
    _free("output_dir", "str", None),
    _free("per_device_train_batch_size", "int", 8),
    _decides("num_train_epochs", "float", 3.0),
    _decides("max_steps", "int", -1),
    _decides("learning_rate", "float", 2e-05),
    _decides("lr_scheduler_type", "choice", "linear", choices=SCHEDULERS),
    _decides("lr_scheduler_kwargs", "dict", None),
    _decides("warmup_steps", "float", 0),
    _decides("optim", "choice", "adamw_torch_fused", choices=OPTIMIZERS),
    _decides("optim_args", "str", None),
    _decides("weight_decay", "float", 0.0),
    _decides("adam_beta1", "float", 0.9),
    _decides("adam_beta2", "float", 0.999),
    _decides("adam_epsilon", "float", 1e-08),
    _refused("optim_target_modules", "str", None, _SMALL),
    _free("gradient_accumulation_steps", "int", 1),
    _refused("average_tokens_across_devices", "bool", True, _EACH_LOSS),
    _decides("max_grad_norm", "float", 1.0),
    _refused("label_smoothing_factor", "float", 0.0, "the loss is the plain cross-entropy of the learned tokens"),
    _free("bf16", "switch", None),
    _free("fp16", "bool", False),
    _refused("bf16_full_eval", "bool", False, _EVAL_TYPE),
    _refused("fp16_full_eval", "bool", False, _EVAL_TYPE),
    _free("tf32", "switch", None),
    _free("activation_checkpointing", "bool", None),
    _free("activation_checkpointing_kwargs", "dict", None),
    _free("gradient_checkpointing", "bool", True),
    _free("gradient_checkpointing_kwargs", "dict", None),
    _refused("torch_compile", "bool", False, _COMPILE),
    _refused("torch_compile_backend", "str", None, _COMPILE),
    _refused("torch_compile_mode", "str", None, _COMPILE),
    _refused("use_liger_kernel", "bool", False, _LIGER),
    _refused("liger_kernel_config", "dict", None, _LIGER),
    _refused("use_cache", "bool", False, "training reads every token once and keeps no cache of keys and values"),
    _refused("neftune_noise_alpha", "float", None, _NOISE),
    _free("torch_empty_cache_steps", "int", None),
    _refused("auto_find_batch_size", "bool", False, _HALVED),
    _free("logging_strategy", "choice", "steps", choices=_WHEN),
    _free("logging_steps", "float", 10),
    _free("logging_first_step", "bool", False),
    _free("log_on_each_node", "bool", True),
    _refused("logging_nan_inf_filter", "bool", True, "a loss that is not finite stops the run"),
    _refused("include_num_input_tokens_seen", "bool", "no", _SEEN),
    _free("log_level", "choice", "passive", choices=_LEVELS),
    _free("log_level_replica", "choice", "warning", choices=_LEVELS),
    _free("disable_tqdm", "switch", None),
    _free("report_to", "str", "none"),
    _free("run_name", "str", None),
    _free("project", "str", "huggingface"),
    _free("trackio_space_id", "str", None),
    _free("trackio_bucket_id", "str", None),
    _free("trackio_static_space_id", "str", None),
    _free("eval_strategy", "choice", "no", choices=_WHEN),
    _free("eval_steps", "float", None),
    _free("eval_delay", "float", 0),
    _free("per_device_eval_batch_size", "int", 8),
    _refused("prediction_loss_only", "bool", False, _PREDICTIONS),
    _free("eval_on_start", "bool", False),
    _refused("eval_do_concat_batches", "bool", True, _PREDICTIONS),
    _refused("eval_use_gather_object", "bool", False, _PREDICTIONS),
    _refused("eval_accumulation_steps", "int", None, _PREDICTIONS),
    _refused("include_for_metrics", "list", (), _PREDICTIONS),
    _refused("batch_eval_metrics", "bool", False, _PREDICTIONS),
    _refused("save_only_model", "bool", False, _WHOLE),
    _free("save_strategy", "choice", "steps", choices=("no", "steps", "epoch", "best")),
    _free("save_steps", "float", 500),
    _refused("save_on_each_node", "bool", False, "a run has one folder, and its main process writes it"),
    _free("save_total_limit", "int", None),
    _refused("enable_jit_checkpoint", "bool", False, "SIGTERM saves the run and ends it already"),
    _refused("push_to_hub", "bool", False, _HUB),
    _refused("hub_token", "str", None, _HUB),
    _refused("hub_private_repo", "switch", None, _HUB),
    _refused("hub_model_id", "str", None, _HUB),
    _refused(
        "hub_strategy", "choice", "every_save", _HUB, choices=("end", "every_save", "checkpoint", "all_checkpoints")
    ),
    _refused("hub_always_push", "bool", False, _HUB),
    _refused("hub_revision", "str", None, _HUB),
    _refused("load_best_model_at_end", "bool", False, _LAST),
    _decides("metric_for_best_model", "str", None),
    _decides("greater_is_better", "switch", None),
    _decides("ignore_data_skip", "bool", False),
    _refused("restore_callback_states_from_checkpoint", "bool", False, _WHOLE),
    _free("full_determinism", "bool", False),
    _decides("seed", "int", 42),
    _refused("data_seed", "int", None, "the field `seed` draws the order too"),
    _free("use_cpu", "bool", False),
    _refused("accelerator_config", "dict", None, "qllava itself decides which process computes which sample"),
    _refused("parallelism_config", "object", None, _PYTHON),
    _refused("dataloader_drop_last", "bool", False, "every sample is in a step of every epoch"),
    _free("dataloader_num_workers", "int", 0),
    _free("dataloader_pin_memory", "bool", True),
    _free("dataloader_persistent_workers", "bool", False),
    _free("dataloader_prefetch_factor", "int", None),
    _free("dataloader_multiprocessing_context", "choice", None, choices=("fork", "spawn", "forkserver")),
    _refused("dataloader_in_order", "bool", True, _ORDERED),
    _refused("remove_unused_columns", "bool", True, "the collator takes what it needs"),
    _refused("label_names", "list", None, "what is learned follows from the conversation alone"),
    _refused(
        "train_sampling_strategy",
        "choice",
        "random",
        _ORDER,
        choices=("random", "sequential", "group_by_length", "batch_rebalance"),
    ),
    _refused("length_column_name", "str", "length", "lengths are counted when the data is encoded"),
    _refused("ddp_find_unused_parameters", "switch", None, "every pack uses everything that is trained"),
    _free("ddp_bucket_cap_mb", "int", None),
    _free("ddp_broadcast_buffers", "switch", None),
    _free("ddp_static_graph", "switch", None),
    _free("ddp_backend", "choice", None, choices=("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")),
    _free("ddp_timeout", "int", 1800),
    _refused("fsdp", "str", None, _FSDP),
    _refused("fsdp_config", "dict", None, _FSDP),
    _free("deepspeed", "dict", None),
    _free("debug", "list", ""),
    _free("skip_memory_metrics", "bool", True),
    _refused("do_train", "bool", False, _SCRIPTS),
    _refused("do_eval", "bool", False, _SCRIPTS),
    _refused("do_predict", "bool", False, _SCRIPTS),
    _refused("resume_from_checkpoint", "str", None, "the newest checkpoint in output_dir is taken"),
    _free("local_rank", "int", -1),
    _refused("model_init_kwargs", "dict", None, "the model is assembled from its parts"),
    _refused("trust_remote_code", "bool", False, "no remote code is run"),
    _refused("router_aux_loss_coef", "float", None, "no language model that qllava builds on is a mixture of experts"),
    _refused("chat_template_path", "str", None, "the field `template` decides"),
    _refused("dataset_text_field", "str", "text", "examples are recognized by their own keys"),
    _refused("dataset_kwargs", "dict", None, "qllava prepares the data itself"),
    _refused("dataset_num_proc", "int", None, _ENCODED),
    _refused("eos_token", "str", None, "the template decides where a turn ends"),
    _decides("max_length", "int", 1024),
    _refused(
        "truncation_mode", "choice", "keep_start", "the field `too_long` decides", choices=("keep_end", "keep_start")
    ),
    _refused("shuffle_dataset", "bool", False, "the seed draws the order of every epoch"),
    _refused("packing", "bool", False, _PACKS),
    _refused("packing_strategy", "choice", "bfd", _PACKS, choices=("bfd", "bfd_split", "wrapped")),
    _refused("padding_free", "bool", False, _PACKS),
    _refused("pad_to_multiple_of", "str", "auto", "a pack has the length of its samples and no padding"),
    _refused("eval_packing", "switch", None, _PACKS),
    _refused("completion_only_loss", "switch", None, _ANSWERS),
    _refused("assistant_only_loss", "bool", False, _ANSWERS),
    _decides("loss_type", "choice", "nll", choices=("nll", "dft", "chunked_nll")),
    _free("activation_offloading", "bool", False),
    _refused("pad_token", "str", None, "padding is never learned and never seen"),
)

_OURS_FREE = frozenset(
    (
        *("model_name_or_path", "language_model", "vision_tower", "projector", "overwrite_output_dir", "skip_check"),
        *("train_file", "eval_file", "pretrain_file", "image_folder", "tokens_per_row", "fit_memory"),
        *("recompute_layers", "stop_tower", "prune_last_layer", "lora_first", "compile_layers", "eval_questions"),
        "eval_questions_final",
        "base_model",
    )
)
"""Paths are not compared, because a run may be carried to another machine: data is known by its bytes, the base by its
fingerprint. The others say how the same is computed, and what is measured."""

PATHS = frozenset(
    (
        *("model_name_or_path", "language_model", "vision_tower", "projector", "train_file", "eval_file"),
        *("pretrain_file", "image_folder", "output_dir", "deepspeed", "base_model"),
    )
)
"""Settings that hold a path, or may: `~` is expanded in each."""

LISTS = frozenset(("train_file", "eval_file", "pretrain_file", "report_to", "debug"))
"""Settings of text that a YAML may give as a list too."""

# The least and the most that a number may be. None: no bound. A string says why a number just outside is refused.
_NOTHING = "; nothing would be trained"
_AT_LEAST_1 = (1, None, "")
_AT_LEAST_0 = (0, None, "")
_ABOVE_0 = (5e-324, None, "")  # the smallest number above 0
_SHARE = (0, 1 - 2**-53, "")  # below 1
RANGES: Mapping[str, tuple[float | None, float | None, str]] = {
    "num_train_epochs": (5e-324, None, _NOTHING),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "tokens_per_row", "save_total_limit"), _AT_LEAST_1),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"), _AT_LEAST_1),
    **dict.fromkeys(("ddp_bucket_cap_mb", "lora_alpha"), _AT_LEAST_1),
    **dict.fromkeys(("learning_rate", "projector_lr", "weight_decay", "max_grad_norm", "warmup_steps"), _AT_LEAST_0),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers", "recompute_layers", "eval_questions"), _AT_LEAST_0),
    "eval_questions_final": _AT_LEAST_0,
    "lora_r": _AT_LEAST_0,  # 0 is stage 1 for `qllava plan`; a stage 2 refuses it
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "adam_epsilon"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _SHARE),
    "seed": (0, 2**32 - 1, ""),
}


def of_config(config: type) -> tuple[Field, ...]:
    """The fields of one of `qllava.config`'s dataclasses."""
    hints = get_type_hints(config)
    fields = []
    for own in dataclasses.fields(config):
        choices = tuple(own.metadata.get("choices", ()))
        kind = "choice" if choices else _kind(hints[own.name])
        about = own.metadata.get("help", "")
        fields.append(Field(own.name, kind, own.default, "", own.name in _OURS_FREE, choices, about))
    return tuple(fields)


def _kind(hint: Any) -> Kind:
    """The kind of an annotation: `int`, `float | None` and the like."""
    some = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (plain,) = (one for one in some if one is not type(None))
    if get_origin(plain) is list:
        return "list"
    if plain is bool and len(some) == 2:
        return "switch"
    return {int: "int", float: "float", bool: "bool", str: "str"}[plain]  # type: ignore[return-value]


MODEL, DATA, LOOP = of_config(ModelConfig), of_config(DataConfig), of_config(LoopConfig)
_OUR_NAMES = {field.name for field in LOOP}
_OF_TRL = {field.name: field for field in TRL}
# TRL says what one of its fields is, and we say what its default is.
_LOOP = tuple(
    dataclasses.replace(_OF_TRL[own.name], default=own.default, help=own.help) if own.name in _OF_TRL else own
    for own in LOOP
)
FIELDS: Mapping[str, Field] = {
    field.name: field for field in (*MODEL, *DATA, *_LOOP, *(field for field in TRL if field.name not in _OUR_NAMES))
}
"""Every setting of a recipe."""


def deciding(names: Iterable[str]) -> list[str]:
    """Those of some names that decide what a run learns: a resumed run must have the same values."""
    return [name for name in names if name not in FIELDS or not FIELDS[name].free]

"""One table of all settings of a recipe: whether a setting is used, and whether a resumed run may change it.

TRL's `SFTConfig` (with what it inherits from transformers' `TrainingArguments`) has over a hundred fields, and
importing it takes seconds. They are listed here, so that a command line is checked, and `--help` is printed,
before torch is imported. Each field belongs to one class:

    decides   used; it decides what the run learns, so a resumed run must have the same value
    free      used; it decides how the run computes, saves or reports, and a resumed run may have another value
    refused   not used; any value but the default is refused, with the reason

A contract test compares the table with the TRL that is installed: a field that a new release adds, removes or changes
fails it by name. The reasons were checked against TRL 1.16.0 and transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "float", "bool", "switch", "str", "choice", "list", "dict", "object"]
Use = Literal["decides", "free", "refused"]


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    """Name of the flag and of the YAML key."""
    kind: Kind
    """`switch` is a bool whose flag needs a value (None: decided elsewhere); `dict` is a mapping, or its JSON."""
    default: Any
    """Default value: TRL's for a field of TRL, qllava's for its own field."""
    use: Use
    """Class of the field; see the module docstring."""
    refused: str = ""
    """Why the field is refused; empty for a field that is used."""
    choices: tuple[str, ...] = ()
    """Allowed values; empty if all are allowed."""
    help: str = ""
    """One sentence for the help; empty for fields that TRL documents."""


def _decides(name: str, kind: Kind, default: Any, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, "decides", choices=choices)


def _free(name: str, kind: Kind, default: Any, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, "free", choices=choices)


def _refused(name: str, kind: Kind, default: Any, reason: str, *, choices: tuple[str, ...] = ()) -> Field:
    return Field(name, kind, default, "refused", reason, choices)


_PACKS = "qllava packs the samples itself, images included"
_ANSWERS = "the loss is always computed on the answers only (in stage 1 on the captions)"
_EVAL_TYPE = "evaluation uses the same data type as training"
_COMPILE = (
    "packs differ in length and grouping, so torch would recompile the whole model for every pack; see `compile_layers`"
)
_LIGER = (
    "its kernels would replace the norms and gates that `compile_layers` compiles, and TRL removes the field in its "
    "version 2"
)
_PREDICTIONS = "evaluation computes the loss and answers questions, but stores no predictions"
_HUB = "a run is not uploaded during training; upload the folder of the finished run or of the merged model"
_SCRIPTS = "only transformers' example scripts use it; `eval_strategy` decides when a run is evaluated"
_WHOLE = "a checkpoint contains and restores everything that resuming needs"
_FSDP = (
    "4-bit weights are prepared for FSDP before the trainer reads this field; give the FSDP settings to "
    "accelerate instead: accelerate launch --config_file recipes/accelerate/fsdp2_qlora.yaml"
)

_WHEN = ("no", "steps", "epoch")
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
FOLLOWING = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that change the learning rate only at evaluations."""
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
    _refused(
        "optim_target_modules",
        "str",
        None,
        "it is for optimizers of whole weight matrices (GaLore, APOLLO), and only LoRA and the projector are trained",
    ),
    _free("gradient_accumulation_steps", "int", 1),
    _refused(
        "average_tokens_across_devices",
        "bool",
        True,
        "the loss of a step is always the mean over the learned tokens of all processes",
    ),
    _decides("max_grad_norm", "float", 1.0),
    _refused(
        "label_smoothing_factor",
        "float",
        0.0,
        "it needs the logits of all tokens, and qllava computes only those of the learned tokens",
    ),
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
    _refused("use_cache", "bool", False, "training needs no cache of keys and values"),
    _refused(
        "neftune_noise_alpha",
        "float",
        None,
        "its noise is scaled by the length of one sample, and a pack contains several samples",
    ),
    _free("torch_empty_cache_steps", "int", None),
    _refused(
        "auto_find_batch_size",
        "bool",
        False,
        "when memory runs out, qllava halves the packs and keeps the samples of a step",
    ),
    _free("logging_strategy", "choice", "steps", choices=_WHEN),
    _free("logging_steps", "float", 10),
    _free("logging_first_step", "bool", False),
    _free("log_on_each_node", "bool", True),
    _refused("logging_nan_inf_filter", "bool", True, "a loss that is not finite stops the run"),
    _refused(
        "include_num_input_tokens_seen", "bool", "no", "the number of tokens seen is always logged, as num_tokens"
    ),
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
    _refused("save_on_each_node", "bool", False, "a run has one folder, which all its machines share"),
    _free("save_total_limit", "int", None),
    _refused("enable_jit_checkpoint", "bool", False, "SIGTERM always saves the run and ends it"),
    _refused("push_to_hub", "bool", False, _HUB),
    _refused("hub_token", "str", None, _HUB),
    _refused("hub_private_repo", "switch", None, _HUB),
    _refused("hub_model_id", "str", None, _HUB),
    _refused(
        "hub_strategy", "choice", "every_save", _HUB, choices=("end", "every_save", "checkpoint", "all_checkpoints")
    ),
    _refused("hub_always_push", "bool", False, _HUB),
    _refused("hub_revision", "str", None, _HUB),
    _refused(
        "load_best_model_at_end",
        "bool",
        False,
        "the result of a run is its last weights; to use a checkpoint, merge it",
    ),
    _decides("metric_for_best_model", "str", None),
    _decides("greater_is_better", "switch", None),
    _decides("ignore_data_skip", "bool", False),
    _refused("restore_callback_states_from_checkpoint", "bool", False, _WHOLE),
    _free("full_determinism", "bool", False),
    _decides("seed", "int", 42),
    _refused("data_seed", "int", None, "the field `seed` also decides the order of the data"),
    _free("use_cpu", "bool", False),
    _refused(
        "accelerator_config",
        "dict",
        None,
        "qllava decides which process computes which sample, and when gradients are summed",
    ),
    _refused(
        "parallelism_config",
        "object",
        None,
        "a pack is computed by one process; several processes, started by `accelerate launch`, share the samples",
    ),
    _refused("dataloader_drop_last", "bool", False, "every epoch uses every sample"),
    _free("dataloader_num_workers", "int", 0),
    _free("dataloader_pin_memory", "bool", True),
    _free("dataloader_persistent_workers", "bool", False),
    _free("dataloader_prefetch_factor", "int", None),
    _free("dataloader_multiprocessing_context", "choice", None, choices=("fork", "spawn", "forkserver")),
    _refused(
        "dataloader_in_order",
        "bool",
        True,
        "the samples of a step would depend on the speed of the workers",
    ),
    _refused("remove_unused_columns", "bool", True, "qllava's collator selects the columns that it needs"),
    _refused("label_names", "list", None, "labels are computed from the conversation"),
    _refused(
        "train_sampling_strategy",
        "choice",
        "random",
        "samples about one image stay together, in an order drawn with the seed",
        choices=("random", "sequential", "group_by_length", "batch_rebalance"),
    ),
    _refused("length_column_name", "str", "length", "qllava counts the lengths when it encodes the data"),
    _refused("ddp_find_unused_parameters", "switch", None, "every pack uses all parameters that are trained"),
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
    _refused(
        "resume_from_checkpoint", "str", None, "a run resumes from the newest intact checkpoint in its output_dir"
    ),
    _free("local_rank", "int", -1),
    _refused("model_init_kwargs", "dict", None, "the model is assembled from its parts"),
    _refused("trust_remote_code", "bool", False, "no remote code is run"),
    _refused("router_aux_loss_coef", "float", None, "no language model that qllava builds on is a mixture of experts"),
    _refused("chat_template_path", "str", None, "the field `template` decides"),
    _refused("dataset_text_field", "str", "text", "examples are recognized by their own keys"),
    _refused("dataset_kwargs", "dict", None, "qllava prepares the data itself"),
    _free("dataset_num_proc", "int", None),
    _refused("eos_token", "str", None, "the field `template` decides which token ends a turn"),
    _decides("max_length", "int", 1024),
    _refused(
        "truncation_mode", "choice", "keep_start", "the field `too_long` decides", choices=("keep_end", "keep_start")
    ),
    _refused("shuffle_dataset", "bool", False, "qllava shuffles every epoch with the seed"),
    _refused("packing", "bool", False, _PACKS),
    _refused("packing_strategy", "choice", "bfd", _PACKS, choices=("bfd", "bfd_split", "wrapped")),
    _refused("padding_free", "bool", False, _PACKS),
    _refused(
        "pad_to_multiple_of",
        "str",
        "auto",
        "only TRL's collators read it; qllava's collator builds packs without padding",
    ),
    _refused("eval_packing", "switch", None, _PACKS),
    _refused("completion_only_loss", "switch", None, _ANSWERS),
    _refused("assistant_only_loss", "bool", False, _ANSWERS),
    _decides("loss_type", "choice", "nll", choices=("nll", "dft", "chunked_nll")),
    _free("activation_offloading", "bool", False),
    _refused("pad_token", "str", None, "qllava uses the padding token of the tokenizer, which is never learned"),
)
"""Fields of TRL, in the order of TRL's `--help`."""

# Paths are free, because a run may be moved to another machine: data is identified by the hash of its bytes,
# the base by its fingerprint. Settings that only change how the result is computed or measured are free too.
OURS: Mapping[str, Use] = {
    "model_name_or_path": "free",
    "language_model": "free",
    "vision_tower": "free",
    "projector_type": "decides",
    "projector": "free",
    "vision_feature_layer": "decides",
    "image_aspect": "decides",
    "template": "decides",
    "load_in_4bit": "decides",
    "lora_r": "decides",
    "lora_alpha": "decides",
    "lora_dropout": "decides",
    "base_model": "free",
    "train_file": "free",
    "eval_file": "free",
    "image_folder": "free",
    "pretrain_file": "free",
    "too_long": "decides",
    "skip_check": "free",
    "projector_lr": "decides",
    "share_image_prefix": "decides",
    "tokens_per_pack": "free",
    "fit_memory": "free",
    "recompute_layers": "free",
    "stop_tower": "free",
    "prune_last_layer": "free",
    "lora_first": "free",
    "compile_layers": "free",
    "eval_questions": "free",
    "eval_questions_final": "free",
    "overwrite_output_dir": "free",
}
"""qllava's own settings; `qllava.config` has their types, defaults and help."""

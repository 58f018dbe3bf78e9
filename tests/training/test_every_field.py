"""Every field of TRL's config at another value than its default: it works, or one sentence before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from qllava.config import InputError
from qllava.training import folders
from qllava.training.options import command
from qllava.training.options.before import look
from qllava.training.options.table import OPTIMIZERS, SCHEDULERS, TRL, Field
from qllava.training.settings import resolve
from qllava.training.trial import try_out
from tests.tiny_models import make_tiny_parts, make_tiny_records
from tests.tiny_runs import Tiny, make_trainer, refusal

# What is tried; a field that is not here gets a value by its kind.
VALUES: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "metric_for_best_model": "eval_loss",
    "ddp_backend": "gloo",
    "debug": "underflow_overflow",
    "max_steps": "2",
    "report_to": "all",
    "eval_strategy": "steps",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "dataloader_multiprocessing_context": "spawn --dataloader_num_workers 1",
    "dataloader_prefetch_factor": "1 --dataloader_num_workers 1",
    "dataloader_persistent_workers": "true --dataloader_num_workers 1",
    "local_rank": "0",
    "loss_type": "dft",
}
# Those that this machine, or a machine without a GPU, cannot do; the sentence says so.
NEEDS_MORE = {
    "fp16": "needs a GPU",
    "activation_offloading": "needs a GPU",
    "tf32": "contradict each other",
    "optim_args": "optim_args has no effect with optim",
    "deepspeed": "",
}


def value(own: Field) -> str:
    """A value that is possible and not the default."""
    if own.name in VALUES:
        return str(VALUES[own.name])
    if own.choices:
        return next(choice for choice in own.choices if choice != own.default)
    if own.kind in ("bool", "switch"):
        return "false" if own.default is True else "true"
    texts = {"int": "3", "float": "0.5", "dict": "some/name", "list": "name", "str": "some/name", "object": "x"}
    return texts[own.kind]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny parts and examples, without a run."""
    folder = tmp_path_factory.mktemp("parts")
    return Tiny(*make_tiny_parts(folder), make_tiny_records(folder), folder / "no", folder / "run")


def resolved(parts: Tiny, words: list[str]) -> Any:
    """What a recipe does with a command line before it loads anything."""
    own = ["--language_model", str(parts.language_model), "--vision_tower", str(parts.tower)]
    line = [*own, "--train_file", str(parts.rows), "--eval_file", str(parts.rows), *words]
    given = command.read(line, output_dir=str(parts.stage2), nano={})
    look(given, stage1=True)
    settings = resolve(given)
    try_out(settings.train)
    return settings


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    yield


@pytest.mark.parametrize("own", TRL, ids=lambda own: own.name)
def test_a_value_that_is_not_the_default(own: Field, parts: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"--{own.name} {value(own)}" if own.kind != "dict" else f"--{own.name}={value(own)}".replace(": ", ":")
    if not (own.refused or own.name in NEEDS_MORE):
        settings = resolved(parts, words.split())
        assert own.name in settings.explicit
        found = getattr(settings.train, own.name)
        assert found != own.default or own.name == "ddp_backend"  # which one process has no use for
        return
    with pytest.raises(InputError) as caught:
        resolved(parts, words.split())
    said = refusal(caught.value)
    assert own.name in said
    assert ("has no effect in qllava: " + own.refused in said) if own.refused else NEEDS_MORE[own.name] in said


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_works_or_is_one_sentence(name: str, parts: Tiny) -> None:
    try:
        resolved(parts, ["--optim", name])
    except InputError as error:
        assert f"optim {name}" in refusal(error)


ARGUMENTS = {
    "cosine_with_min_lr": '{"min_lr": 1e-6}',
    "cosine_warmup_with_min_lr": '{"min_lr": 1e-6}',
    "warmup_stable_decay": '{"num_decay_steps": 1}',
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_works_and_says_what_it_needs(name: str, parts: Tiny) -> None:
    words = ["--lr_scheduler_type", name]
    if name in ARGUMENTS:
        with pytest.raises(InputError, match=f"lr_scheduler_type {name} needs lr_scheduler_kwargs"):
            resolved(parts, words)
        words += ["--lr_scheduler_kwargs", ARGUMENTS[name]]
    if name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(InputError, match="needs the held-out loss"):
            resolved(parts, words)
        words += ["--eval_strategy", "steps"]
    resolved(parts, words)
    constant = name in ("constant", "constant_with_warmup")
    with pytest.raises(InputError) as caught:
        resolved(parts, [*words, "--lr_scheduler_kwargs", json.dumps({"no_such_argument": 1, "min_lr": 1e-6,
                                                                     "num_decay_steps": 1})])  # fmt: skip
    assert ("lr_scheduler_kwargs has no effect" if constant else "no_such_argument") in refusal(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0. Give a number of at least 1"),
        ("--per_device_eval_batch_size -1", "per_device_eval_batch_size is -1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0"),
        ("--num_train_epochs 0", "nothing would be trained"),
        ("--num_train_epochs -1", "nothing would be trained"),
        ("--max_steps -2", "only -1 has a meaning"),
        ("--learning_rate -0.0001", "learning_rate is -0.0001. Give a number of at least 0"),
        ("--learning_rate nan", "Give a finite number"),
        ("--warmup_steps -1", "warmup_steps is -1"),
        ("--adam_beta1 1", "below 1"),
        ("--lora_dropout 1", "lora_dropout is 1.0. Give a number of at least 0 and below 1"),
        ("--max_length 0", "max_length is 0"),
        ("--save_total_limit 0", "save_total_limit is 0"),
        ("--seed -1", "seed is -1"),
        ("--seed 4294967296", "at most 4294967295"),
        ("--logging_steps 0", "logging_steps is 0.0. Give a number above 0"),
        ("--save_steps 1.5", "Give a whole number, or a fraction"),
        ("--save_strategy best", "save_strategy best needs"),
        ("--optim_args lr", "optim_args has no effect"),
        ("--optim sgd --optim_args momentum=much", "optim sgd cannot be used with its arguments"),
        ("--optim sgd --optim_args momentun=0.9", "momentun, which optim sgd does not read. Known keys: momentum"),
        ('--gradient_checkpointing_kwargs {"odd":1}', "or gradient_checkpointing_kwargs, its alias) is {'odd': 1}"),
        ('--activation_checkpointing_kwargs {"early_stop":1,"odd":1}', "torch.utils.checkpoint does not accept it"),
        ("--dataloader_multiprocessing_context spawn", "multiprocessing_context needs data loader workers"),
    ],
)
def test_numbers_that_are_not_possible(words: str, said: str, parts: Tiny) -> None:
    with pytest.raises(InputError) as caught:
        resolved(parts, words.split())
    assert said in refusal(caught.value)


@pytest.mark.parametrize(
    ("words", "stage1", "said"),
    [
        (
            "--metric_for_best_model accuracy",
            False,
            "'accuracy', which is not reported. Choose one of eval_loss, eval_exact",
        ),
        ("--metric_for_best_model exact_match", True, "because stage 1 answers no questions. Choose one of eval_loss"),
        ("--metric_for_best_model eval_exact_match --eval_questions 0", False, "because eval_questions is 0. Choose"),
        ("--metric_for_best_model loss", True, ""),
        ("--metric_for_best_model eval_exact_match", False, ""),
        ("--metric_for_best_model mean_token_accuracy", True, ""),
    ],
)
def test_the_best_is_by_what_is_reported(words: str, stage1: bool, said: str, parts: Tiny) -> None:
    given = command.read([*words.split(), "--train_file", str(parts.rows)], output_dir="x", nano={})
    try:
        look(given, stage1=stage1)
    except InputError as error:
        assert said and said in refusal(error)
    else:
        assert not said


class _OfAnotherPackage(torch.optim.SGD):
    """As the schedule-free ones: a step before `train` is refused, with an error of no particular kind."""

    training = False

    def train(self) -> None:
        self.training = True

    def step(self, closure: Any = None) -> Any:
        if not self.training:
            raise Exception("Optimizer was not in train mode when step is called.")
        return super().step(closure)


def test_an_optimizer_that_wants_to_be_told_of_training(parts: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (_OfAnotherPackage, {"lr": 0.1}))
    resolved(parts, [])
    monkeypatch.delattr(_OfAnotherPackage, "train")
    with pytest.raises(InputError, match="cannot be used with its arguments .Optimizer was not in train mode"):
        resolved(parts, [])


def test_lora_of_rank_0_is_for_plan_alone(parts: Tiny) -> None:
    given = command.read(["--lora_r", "0", "--train_file", str(parts.rows)], output_dir="x", nano={})
    with pytest.raises(InputError, match="lora_r is 0"):
        look(given, stage1=False)


def test_bf16_on_a_cpu_needs_no_other_setting(parts: Tiny, tmp_path: Path) -> None:
    """And trains, with what reaches into a step and was not tried above."""
    trainer = make_trainer(
        parts,
        tmp_path,
        bf16=True,
        loss_type="dft",
        optim="adafactor",
        debug="underflow_overflow",
        max_steps=2,
        skip_memory_metrics=False,
        torch_empty_cache_steps=1,
        logging_first_step=True,
        lora_dropout=0,
    )
    assert trainer.args.use_cpu
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("--image_aspect pad", "image_aspect is pad"),
        ("--vision_feature_layer -1", "vision_feature_layer is -1"),
        ("--projector_type linear", "projector_type is linear"),
    ],
)
def test_a_ready_llava_decides_itself(words: str, setting: str, hf_layout: Path, parts: Tiny) -> None:
    line = ["--model_name_or_path", str(hf_layout), "--train_file", str(parts.rows), *words.split()]
    settings = resolve(command.read(line, output_dir=str(parts.stage2), nano={}))
    has = _has(hf_layout)
    if str(has[setting.split()[0]]) == words.split()[1]:
        words = words.replace("pad", "crop")
        setting = setting.replace("pad", "crop")
        line[-2:] = words.split()
        settings = resolve(command.read(line, output_dir=str(parts.stage2), nano={}))
    with pytest.raises(InputError) as caught:
        folders.settle_model(settings)
    assert setting in refusal(caught.value) and "training cannot change it" in str(caught.value)


def test_what_a_ready_llava_has_is_recorded(hf_layout: Path, parts: Tiny) -> None:
    line = ["--model_name_or_path", str(hf_layout), "--train_file", str(parts.rows)]
    settings = resolve(command.read(line, output_dir=str(parts.stage2), nano={}))
    folders.settle_model(settings)
    has = _has(hf_layout)
    assert {name: getattr(settings.model, name) for name in has} == has
    # The same value may be given.
    same = [word for name, one in has.items() for word in (f"--{name}", str(one))]
    folders.settle_model(resolve(command.read([*line, *same], output_dir=str(parts.stage2), nano={})))


def _has(folder: Path) -> dict[str, Any]:
    """Read from the folder's own files."""
    config = json.loads((folder / "config.json").read_text())
    image = json.loads((folder / "preprocessor_config.json").read_text())
    return {
        "projector_type": "mlp2x_gelu" if config["projector_hidden_act"] == "gelu" else "linear",
        "vision_feature_layer": config["vision_feature_layer"],
        "image_aspect": "pad" if image.get("do_pad") else "crop" if image.get("do_center_crop") else "squash",
    }

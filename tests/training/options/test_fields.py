"""The table of settings against the TRL that is installed, and the parser without TRL against TRL's own."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import SFTConfig, TrlParser

from qllava.config import DataConfig, InputError, LoopConfig, ModelConfig
from qllava.spelling import meant
from qllava.training.options import command
from qllava.training.options.defaults import FINETUNE, NANO_FINETUNE, PRETRAIN
from qllava.training.options.fields import FIELDS, PATHS
from qllava.training.options.table import OURS, TRL, Field
from qllava.training.settings import TrainConfig, parse

OF_TRL = {own.name: own for own in TRL}
FROM_TRL = TrlParser([SFTConfig])
ACTIONS: dict[str, Any] = {}
for _action in FROM_TRL._actions:
    ACTIONS.setdefault(_action.dest, _action)


TABLE = "qllava/training/options/table.py"
HOW = (
    "`_decides` where it changes what is learned, `_free` where a resumed run may change it, `_refused` with a reason "
    "where it has no effect"
)


def unclassified(config: type) -> list[str]:
    """A sentence for each field that is in a config and not in the table, or the other way round."""
    installed = [own.name for own in dataclasses.fields(config)]
    new = [name for name in installed if name not in OF_TRL]
    gone = [name for name in OF_TRL if name not in installed]
    return [
        *(f"TRL's SFTConfig has the new field {name}: classify it in TRL of {TABLE}, as {HOW}." for name in new),
        *(f"TRL's SFTConfig has no field {name} any more: remove it from TRL of {TABLE}." for name in gone),
    ]


def test_every_field_of_trls_is_classified() -> None:
    problems = unclassified(SFTConfig)
    assert not problems, "\n".join(problems)


def test_a_field_of_a_new_release_is_named() -> None:
    fields = [(own.name, Any) for own in dataclasses.fields(SFTConfig) if own.name != "seed"]
    other = dataclasses.make_dataclass("Other", [*fields, ("teacher_forcing", bool)])
    new, gone = unclassified(other)
    assert "new field teacher_forcing: classify it in TRL of qllava/training/options/table.py" in new
    assert "no field seed any more" in gone


def test_every_field_of_ours_is_classified() -> None:
    """Those that are TRL's too stand among TRL's."""
    ours = {own.name for config in (ModelConfig, DataConfig, LoopConfig) for own in dataclasses.fields(config)}
    new, gone = sorted(ours - set(OF_TRL) - set(OURS)), sorted(set(OURS) - ours)
    assert not new, f"classify {', '.join(new)} in OURS of {TABLE}, as `decides` or `free`"
    assert not gone, f"remove {', '.join(gone)} from OURS of {TABLE}"
    assert not set(OURS) & set(OF_TRL)


def test_a_class_is_what_it_says() -> None:
    """Only what is refused has a reason, and nothing is in the table twice."""
    assert [own.name for own in FIELDS.values() if (own.use == "refused") != bool(own.refused)] == []
    assert len(OF_TRL) == len(TRL)
    assert set(OURS.values()) == {"decides", "free"}


@pytest.mark.parametrize("own", dataclasses.fields(SFTConfig), ids=lambda own: own.name)
def test_a_field_is_as_trl_has_it(own: Any) -> None:
    """Type, choices, default, and how its flag is given."""
    row, action = OF_TRL[own.name], ACTIONS[own.name]
    default = own.default if own.default is not dataclasses.MISSING else own.default_factory()
    assert (tuple(default) if isinstance(default, list) else default) == row.default
    assert tuple(action.choices or ()) == row.choices
    kind = getattr(action.type, "__name__", "")
    expected = {"int": "int", "float": "float", "list": ("str", "DebugOption"), "dict": ("str", "dict"), "str": "str"}
    expected |= {"bool": "string_to_bool", "switch": "string_to_bool", "object": "ParallelismConfig"}
    if row.kind != "choice":
        assert kind in expected[row.kind]
    assert (row.kind == "list") == (action.nargs == "+")
    mine = {one.dest: one for one in reversed(command._parser()._actions)}[own.name]
    assert mine.nargs == action.nargs and mine.const == action.const
    assert set(action.option_strings) == set(mine.option_strings)


def test_ours_are_those_of_the_configurations() -> None:
    ours = {own.name for config in (ModelConfig, DataConfig, LoopConfig) for own in dataclasses.fields(config)}
    assert set(FIELDS) == ours | set(OF_TRL)
    assert {own.name for own in dataclasses.fields(TrainConfig)} == (ours | set(OF_TRL)) - {
        own.name for config in (ModelConfig, DataConfig) for own in dataclasses.fields(config)
    }


def test_every_refusal_says_why() -> None:
    assert all(len(own.refused.split()) >= 4 for own in TRL if own.refused)


def values(own: Field) -> st.SearchStrategy[str]:
    """Texts of values that are possible."""
    if own.choices:
        return st.sampled_from(own.choices)
    return {
        "int": st.integers(1, 5).map(str),
        "float": st.sampled_from(["0.5", "1e-4", "0.25"]),
        "bool": st.sampled_from(["true", "False", "yes", "no", "0", "1"]),
        "switch": st.sampled_from(["true", "False", "yes", "no"]),
        "str": st.sampled_from(["some/name", "a", "no", "2024"]),
        "dict": st.just('{"a": 1}'),
        "list": st.sampled_from(["a", "b"]),
    }[own.kind]


# Those that no line can give, or whose type TRL's parser does not know.
_OTHER = ("parallelism_config", "debug", "liger_kernel_config", "model_init_kwargs")
_PLAIN = [own for own in FIELDS.values() if own.name not in _OTHER]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trls_parser_reads_the_same(data: Any) -> None:
    """For lines that are accepted the values are those that TrlParser makes of them, flag by flag."""
    chosen = data.draw(st.lists(st.sampled_from(_PLAIN), max_size=6, unique_by=lambda own: own.name))
    words = []
    for own in chosen:
        flag = data.draw(st.sampled_from([f"--{own.name}", f"--{own.name.replace('_', '-')}"]))
        words += [flag, data.draw(values(own))]
    found = vars(command._parser().parse_args(words))
    parser = TrlParser([ModelConfig, DataConfig, TrainConfig])
    for action in parser._actions:
        action.default = SUPPRESS
    theirs = vars(parser.parse_known_args(words)[0])
    for own in chosen:
        if own.kind == "dict":  # TrainingArguments reads the JSON later
            assert found[own.name] == {"a": 1}
        else:
            assert found[own.name] == theirs[own.name], own.name


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("model", "model_name_or_path"),
        ("model_path", "model_name_or_path"),
        ("lora_rank", "lora_r"),
        ("lora_apha", "lora_alpha"),
        ("epochs", "num_train_epochs"),
        ("num_epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("per_device_batch_size", "per_device_train_batch_size"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("data_path", "train_file"),
        ("dataset", "train_file"),
        ("train_data", "train_file"),
        ("trainfile", "train_file"),
        ("val_file", "eval_file"),
        ("image_dir", "image_folder"),
        ("images_folder", "image_folder"),
        ("output", "output_dir"),
        ("output_folder", "output_dir"),
        ("grad_accum", "gradient_accumulation_steps"),
        ("max_seq_length", "max_length"),
        ("mm_projector_lr", "projector_lr"),
        ("evaluation_strategy", "eval_strategy"),
        ("warmup_ratio", "warmup_steps"),
        ("conv_mode", "template"),
        ("load-in-4-bit", "load_in_4bit"),
        ("save_step", "save_steps"),
        ("zzz", None),
        ("colour", None),
    ],
)
def test_the_name_that_was_meant(typed: str, expected: str | None) -> None:
    assert meant(typed, FIELDS) == expected


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("how", ["flag", "flag=", "yaml"])
def test_a_home_folder_is_expanded_in_every_path(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text(f"{name}: ~/there\n")
    line = {"flag": [f"--{name}", "~/there"], "flag=": [f"--{name}=~/there"], "yaml": ["--config", "~/x.yaml"]}[how]
    found = command.read(line, output_dir="runs/x", nano={})
    there = str(tmp_path / "there")
    assert found.get(name) == ([there] if FIELDS[name].kind == "list" else there)


def test_a_home_folder_is_expanded_in_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("train_file: [{path: ~/a.json, image_folder: ~/i, repeat: 2}, ~/b.json]\n")
    found = command.read(["--config", "~/x.yaml"], output_dir="runs/x", nano={}).values["train_file"]
    first = {"path": f"{tmp_path}/a.json", "image_folder": f"{tmp_path}/i", "repeat": 2}
    assert found == [first, f"{tmp_path}/b.json"]


def test_every_setting_that_holds_a_path_is_known() -> None:
    """By its name or its help; one that is new has to be sorted into `PATHS`, or here."""
    words = ("file", "folder", "dir", "path", "config")
    likely = {own.name for own in FIELDS.values() if own.kind in ("str", "dict") and any(w in own.name for w in words)}
    refused = {own.name for own in FIELDS.values() if own.refused}
    assert likely - PATHS <= refused and not PATHS & refused


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),
        ("save_strategy: No", "save_strategy", InputError),
        ("save_strategy: off", "save_strategy", InputError),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("run_name: 2024", "run_name", "2024"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("run_name: yes", "run_name", "yes"),
        ("run_name: ~", "run_name", None),
        ('run_name: "null"', "run_name", "null"),
        ("output_dir: 007", "output_dir", "007"),
        ("lora_r: 010", "lora_r", 10),
        ("lora_r: 8.5", "lora_r", InputError),
        ("lora_r: true", "lora_r", InputError),
        ("lora_r:", "lora_r", InputError),
        ("load_in_4bit: no", "load_in_4bit", False),
        ("load_in_4bit: maybe", "load_in_4bit", InputError),
        ("load_in_4bit: [true]", "load_in_4bit", InputError),
        ("max_grad_norm: .nan", "max_grad_norm", InputError),
        ("max_grad_norm: null", "max_grad_norm", 0.0),
        ("max_length: null", "max_length", None),
        ("gradient_checkpointing_kwargs: foo", "gradient_checkpointing_kwargs", InputError),
        ("activation_checkpointing_kwargs: foo", "activation_checkpointing_kwargs", InputError),
        ("lr_scheduler_kwargs: num_cycles", "lr_scheduler_kwargs", InputError),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("train_file: [{path: a.json, repeat: 3}, b.json]", "train_file", [{"path": "a.json", "repeat": 3}, "b.json"]),
        ("report_to: [tensorboard, no]", "report_to", ["tensorboard", "no"]),
        ("lora_r: 8\nlora_r: 9", "lora_r", InputError),
    ],
)
def test_yaml_means_what_the_setting_means(text: str, name: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text + "\n")
    line = ["--config", str(tmp_path / "x.yaml")]
    if expected is InputError:
        with pytest.raises(InputError, match=name):
            command.read(line, output_dir="runs/x", nano={})
    else:
        assert command.read(line, output_dir="runs/x", nano={}).values[name] == expected


def test_nothing_is_a_value_that_transformers_takes() -> None:
    """Where TRL's own type is a number or a text, `null` may not reach it, except where its help says so."""
    taken = [own.name for own in FIELDS.values() if own.default is not None and _takes_nothing(own)]
    assert taken == ["max_length", "max_grad_norm"]
    assert command.value_of(FIELDS["max_grad_norm"], None) == 0  # transformers asks whether it is above 0
    assert "`None`" in str(ACTIONS["max_length"].help)


def _takes_nothing(own: Field) -> bool:
    try:
        command.value_of(own, None)
    except ValueError:
        return False
    return True


def test_what_the_user_set_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("lora_r: 8\n")
    found = parse(["--config", str(tmp_path / "x.yaml"), "--seed", "3"], output_dir="runs/x", nano=NANO_FINETUNE)
    assert found.explicit == {"lora_r", "seed"}


def test_help_shows_the_defaults_that_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("lora_r: 8\nlanguage_model: some/llama\neval_steps: 77\n")

    def shown(*line: str, defaults: Any = FINETUNE) -> str:
        assert command.show_help([*line, "--help"], defaults)
        return " ".join(capsys.readouterr().out.split())

    def default(text: str, name: str) -> str:
        return text.split(f" --{name} ")[1].split("(default: ")[1].split(")")[0]

    nano = shown()
    assert default(nano, "lora_r") == "32" and default(nano, "learning_rate") == "0.003"
    assert default(nano, "save_steps") == "125" and default(nano, "output_dir") == "runs/finetune_lora"
    of_the_user = shown("--train_file", "mine.json")
    assert default(of_the_user, "lora_r") == "32" and default(of_the_user, "learning_rate") == "0.001"
    other = shown("--config", str(tmp_path / "x.yaml"))
    assert default(other, "lora_r") == "8" and default(other, "learning_rate") == "0.0002"
    assert default(other, "eval_steps") == "77" and default(other, "projector_lr") == "2e-05"
    assert default(shown(defaults=PRETRAIN), "learning_rate") == "0.003"
    assert "--packing" not in nano  # it has no effect, so that nobody need read about it

"""Parser of a recipe's command line, without torch and TRL: `--config FILE.yaml`, and flags that override it.

It finds the same errors as TRL's parser: the types and choices of every field are in `table.py`. A wrong
flag ends the process with status 2, like argparse. An error in the YAML is an InputError, which the recipes
print as one sentence.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from qllava.arguments import Parser
from qllava.config import RENAMED, InputError, ModelConfig, expanded
from qllava.spelling import suggestion
from qllava.training.options.defaults import Defaults
from qllava.training.options.fields import FIELDS, LISTS, PATHS, RANGES
from qllava.training.options.table import Field
from qllava.training.options.typed import TypedLoader


@dataclass(frozen=True)
class Given:
    """The values that the user set, and the defaults for all others."""

    values: Mapping[str, Any]
    """Values by name, of the right type: those of the YAML, overridden by flags."""
    output_dir: str
    """Default folder of the run."""
    nano: Mapping[str, Any] = field(default_factory=dict)
    """Defaults if the model is nano."""
    nanos_own: Mapping[str, Any] = field(default_factory=dict)
    """Defaults if nano trains on its own examples; they replace those of `nano`."""
    flags: frozenset[str] = frozenset()
    """Names that were set by a flag; the others were set in the YAML."""

    @property
    def is_nano(self) -> bool:
        """Whether the model is built from nano's own parts."""
        names = {own.name for own in fields(ModelConfig)}
        return ModelConfig(**{name: value for name, value in self.values.items() if name in names}).is_nano

    @property
    def defaults(self) -> dict[str, Any]:
        """Values that replace the defaults of fields."""
        own = self.is_nano and not self.values.get("train_file")
        return {"output_dir": self.output_dir, **(self.nano if self.is_nano else {}), **(self.nanos_own if own else {})}

    def get(self, name: str) -> Any:
        """Return the value of a setting, or its default."""
        return self.values.get(name, self.defaults.get(name, FIELDS[name].default))


def read(
    args: Sequence[str],
    *,
    output_dir: str,
    nano: Mapping[str, Any],
    nanos_own: Mapping[str, Any] = MappingProxyType({}),
) -> Given:
    """Read flags and the YAML that `--config` names.

    Args:
        args: The command line.
        output_dir: Default folder of the run.
        nano: Values that replace the defaults if the model is nano.
        nanos_own: Values that replace those of `nano` if it trains on its own examples.

    Raises:
        InputError: For an unreadable YAML, an unknown key, a value of a wrong type or out of bounds, or a
            field that would have no effect.
    """
    found = vars(_parser().parse_args(list(args)))
    config = found.pop("config", None)
    of_yaml = _read_yaml(config, found.keys()) if config is not None else {}
    given = Given({**of_yaml, **found}, output_dir, nano, nanos_own, frozenset(found))
    for name, value in found.items():
        _check(FIELDS[name], value)
    return given


def show_help(args: Sequence[str], defaults: Defaults) -> bool:
    """Print the help if the command line asks for it, with the defaults that apply to the rest of that line."""
    if not any(word in ("-h", "--help") for word in args):
        return False
    given = read([word for word in args if word not in ("-h", "--help")], **defaults.for_parsing())
    applied = {**defaults.rates, **given.defaults, **given.values}
    _parser(applied, defaults.about).print_help()
    return True


def _parser(shown: Mapping[str, Any] | None = None, about: str | None = None) -> Parser:
    """Return a parser with a flag for every field, in both spellings, and `--no_FIELD` for fields that default to on.

    Args:
        shown: Values to show in the help instead of a field's own default.
        about: Description of the recipe, for the help.
    """
    parser = Parser(usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE ...]", description=about)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        default=argparse.SUPPRESS,
        help="recipe file with settings; flags override its values",
    )
    groups: dict[bool, Any] = {
        True: parser.add_argument_group("settings of model, data and training"),
        False: parser.add_argument_group("settings of TRL's SFTConfig, explained in its documentation"),
    }
    for own in FIELDS.values():
        _add(groups[bool(own.help)], own, (shown or {}).get(own.name, own.default))
    return parser


def _add(group: Any, own: Field, applies: Any) -> None:
    """Add the flags of a field; the help shows its default."""
    name, dashed = own.name, own.name.replace("_", "-")
    options = [f"--{name}"] + ([f"--{dashed}"] if dashed != name else [])
    kind: dict[str, Any] = {"type": _typed(own), "metavar": own.kind.upper()}
    if own.kind == "bool" or name in ("activation_checkpointing", "fsdp"):
        kind |= {"nargs": "?", "const": True}
    elif own.kind == "list":
        kind |= {"nargs": "+"}
    elif own.choices:
        kind |= {"choices": own.choices, "metavar": None}
    value = f"{applies:g}" if isinstance(applies, float) else applies
    default = "" if applies is None else f"(default: {value})".replace("%", "%%")
    about = argparse.SUPPRESS if own.refused else f"{own.help} {default}".strip() or None
    group.add_argument(*options, default=argparse.SUPPRESS, help=about, **kind)
    if own.kind == "bool" and own.default is True:
        negative = [f"--no_{name}", f"--no-{dashed}"]
        group.add_argument(
            *negative, dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _typed(own: Field) -> Callable[[str], Any]:
    """Return the function that converts the text of a flag into its value."""

    def convert(text: str) -> Any:
        try:
            return value_of(own, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def value_of(own: Field, given: Any) -> Any:
    """Convert text, or a list or mapping of a YAML, into a field's value.

    Raises:
        ValueError: For a value of another type; the message names the expected type.
    """
    if given is None:
        if own.default is None or own.name in _NOTHING:
            return _NOTHING.get(own.name)
        raise ValueError(f"expected {_EXPECTED[own.kind]}, not an empty value")
    if isinstance(given, list):
        if own.kind == "list" or own.name in LISTS:
            return [_part(value) if isinstance(value, dict) else _scalar(own, value) for value in given]
        raise ValueError(f"expected {_EXPECTED[own.kind]}, not a list")
    if isinstance(given, dict):
        if own.kind in ("dict", "object"):
            return given
        raise ValueError(f"expected {_EXPECTED[own.kind]}, not a mapping")
    return _scalar(own, given)


def _part(given: dict[str, Any]) -> dict[str, Any]:
    """Return one file of a data mixture, with `~` expanded in its paths."""
    paths = ("path", "image_folder")
    return {key: expanded(one) if key in paths and isinstance(one, str) else one for key, one in given.items()}


_NOTHING: Mapping[str, Any] = {"max_length": None, "max_grad_norm": 0.0}
"""Meaning of an empty value, in fields with another default; transformers compares max_grad_norm with a number."""
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "switch": "true or false",
    "str": "a text",
    "choice": "one of its choices",
    "list": "a list of names",
    "dict": "a mapping, as JSON on the command line",
    "object": "a Python object",
}
_WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1", "on"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0", "off"), False),
}


def _scalar(own: Field, text: Any) -> Any:
    kind = own.kind
    if not isinstance(text, str):  # an item of a list, whose type YAML has decided
        text = str(text)
    expected = ValueError(f"expected {_EXPECTED[kind]}, not {text!r}")
    if kind in ("int", "float"):
        try:
            return int(text) if kind == "int" else float(text)
        except ValueError:
            raise expected from None
    if kind in ("bool", "switch"):
        if text.lower() not in _WORDS:
            raise expected
        return _WORDS[text.lower()]
    if kind == "dict" and text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"expected {_EXPECTED[kind]}; {text} is not JSON ({error})") from error
    if kind == "dict" and own.name not in PATHS and not own.refused:  # `deepspeed` may also be the path of a file
        raise expected
    return expanded(text) if own.name in PATHS else text


def _read_yaml(path: str, flags: Collection[str]) -> dict[str, Any]:
    """Return the typed settings of a YAML file; values that flags override are not checked further."""
    place = Path(expanded(path))
    try:
        given = TypedLoader.read(place.read_text(encoding="utf-8"), list_like=LISTS)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        said = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason}"
        raise InputError(f"The configuration {path} {said}.") from error
    except (yaml.YAMLError, ValueError) as error:  # PyYAML has no error of its own for the date 2024-13-45
        raise InputError(f"The configuration {path} is not YAML: {' '.join(str(error).split())}.") from error
    if given is None:
        raise InputError(f"The configuration {path} must contain `key: value` lines.")
    values = {}
    for written, (value, line) in given.items():
        where, key = f"{path}:{line}", RENAMED.get(written, written)
        if key != written and key in given:
            raise InputError(
                f"{where}: {written} is the old name of {key}, and both are set. Keep {key} and remove {written}."
            )
        if key not in FIELDS:
            raise InputError(f"{where}: unknown key {key!r}{suggestion(key, FIELDS)}")
        try:
            found = value_of(FIELDS[key], value)
        except ValueError as error:
            raise InputError(f"{where}: {key}: {error}.") from error
        values[key] = [found] if FIELDS[key].kind == "list" and isinstance(found, str) else found
        if key not in flags:
            try:
                _check(FIELDS[key], values[key])
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
    return values


def _check(own: Field, value: Any) -> None:
    """Raise InputError for an invalid value."""
    if own.refused and value != own.default:
        raise InputError(f"The setting {own.name} has no effect in qllava: {own.refused}. Remove {own.name}.")
    if own.choices and value is not None and value not in own.choices:
        raise InputError(f"The setting {own.name} is {value!r}. It must be one of {', '.join(own.choices)}.")
    if own.name == "max_steps" and (value == 0 or value < -1):
        why = "nothing would be trained" if value == 0 else "only -1 has a meaning (use num_train_epochs)"
        raise InputError(f"The setting max_steps is {value}: {why}. Give a number of at least 1, or remove max_steps.")
    least, most, why = RANGES.get(own.name, (None, None, ""))
    if value is None or isinstance(value, str | list | dict):
        return
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise InputError(f"The setting {own.name} is {value}. Give a finite number.")
    if (least is not None and value < least) or (most is not None and value > most):
        raise InputError(f"The setting {own.name} is {value}{why}. Give a number {_between(least, most)}.")


def _between(least: float | None, most: float | None) -> str:
    low = "above 0" if least is not None and 0 < least < 1 else f"of at least {least}"
    return low if most is None else f"{low} and below 1" if most <= 1 else f"{low} and at most {most}"

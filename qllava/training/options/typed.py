"""YAML loader that keeps values as text, so that each setting decides what `no`, `1e-4` or `2024` means.

YAML 1.1 reads `no` as false, `1e-4` as text and `012` as ten. Here a value remains text until the type of the
setting is known. Lists and mappings inside a value are read as YAML, except that `1e-4` is read as a number.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import yaml


class Typed(NamedTuple):
    """A value and its position in the file."""

    value: Any
    """Text, None, a list or a mapping."""
    line: int
    """Line number of the key, counted from 1."""


class TypedLoader(yaml.SafeLoader):
    """A loader for a mapping of settings; see the module docstring."""

    @classmethod
    def read(cls, text: str, *, list_like: Collection[str] = ()) -> dict[str, Typed] | None:
        """Return keys with their values and lines; None when the text is not a mapping of names.

        Args:
            text: Content of the file.
            list_like: Names of settings whose list items remain text too.

        Raises:
            yaml.YAMLError: If the text is not YAML, or has a key twice.
        """
        loader = cls(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                return None
            loader.flatten_mapping(node)
            found: dict[str, Typed] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    return None
                line = key.start_mark.line + 1
                if key.value in found:
                    raise yaml.YAMLError(f"the key {key.value!r} is set twice, the second time in line {line}")
                found[key.value] = Typed(loader._typed(value, key.value in list_like), line)
            return found
        finally:
            loader.dispose()

    def _typed(self, node: yaml.Node, list_like: bool) -> Any:
        if isinstance(node, yaml.ScalarNode):
            # An unquoted null is None; a "null" in quotes is text.
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        if list_like and isinstance(node, yaml.SequenceNode):
            return [self._typed(one, False) for one in node.value]
        return self.construct_object(node, deep=True)


# As in YAML 1.2, a number may have an exponent without a decimal point.
TypedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

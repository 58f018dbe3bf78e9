"""A recipe's YAML with its values as they were typed: what `no`, `1e-4` or `2024` means is for the setting to say.

YAML 1.1 reads `no` as false, `1e-4` as text and `012` as ten. Here the value of a key stays text until the type of the
setting is known. Lists and mappings below it are YAML's, but for numbers such as `1e-4`, which are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import yaml


class Typed(NamedTuple):
    """A value, and where it was read."""

    value: Any
    """Text, None, or a list or mapping."""
    line: int
    """Line of its key, from 1."""


class TypedLoader(yaml.SafeLoader):
    """Reads a mapping of settings; see the head of this file."""

    @classmethod
    def read(cls, text: str, *, list_like: Collection[str] = ()) -> dict[str, Typed] | None:
        """Return keys with their values and lines; None when the text is not a mapping of names.

        Args:
            text: The file's.
            list_like: Names whose lists hold text, which stays as it was typed too.

        Raises:
            yaml.YAMLError: When it is not YAML, or has a key twice.
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
                    raise yaml.YAMLError(f"the key {key.value!r} is there twice, the second time in line {line}")
                found[key.value] = Typed(loader._typed(value, key.value in list_like), line)
            return found
        finally:
            loader.dispose()

    def _typed(self, node: yaml.Node, list_like: bool) -> Any:
        if isinstance(node, yaml.ScalarNode):
            # A plain null is one; a "null" in quotes is a text.
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        if list_like and isinstance(node, yaml.SequenceNode):
            return [self._typed(one, False) for one in node.value]
        return self.construct_object(node, deep=True)


# As YAML 1.2 has it: a number may have an exponent without a point before it.
TypedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

"""Parse YAML whose size in memory is bounded.

An alias costs a line, and each may double what the lines before it mean. PyYAML shares what aliases name, but whatever
walks through the result does not.
"""

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from mtp_modules.core.budget import named_values
from mtp_modules.core.checks import refuse

_MOST_VALUES = 10**5
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_loader = get_loader("yaml")


def parse_yaml(text: str) -> Any:
    """Parse a text as jsonargparse does, and count its values, each as often as aliases repeat it.

    Args:
        text: YAML.

    Raises:
        ValueError: If it is nested too deeply, or has too many values.
        yaml.YAMLError: If it is not valid.
    """
    try:
        _check_merges(yaml.compose(text, Loader=_LOADER), {})
        content = _loader(text)
    except RecursionError:
        refuse("YAML", "is nested too deeply; write it flatter.")
    except (
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:  # PyYAML's own, for odd values
        raise yaml.YAMLError(f"a tag has a value that it does not take: {error}") from error
    named_values("YAML", content, most=_MOST_VALUES)
    return content


def _check_merges(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Return how many pairs a mapping has once those that ``<<`` merges into it are copied; 0 for other nodes.

    PyYAML copies them before it looks for duplicates, so a few lines could otherwise become any number of pairs.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 0
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_VALUES + 1  # until it is known: a mapping must not be merged into itself
    if isinstance(node, yaml.SequenceNode):
        size = sum(_check_merges(item, sizes) for item in node.value)
    else:
        size = 0
        for key, value in node.value:
            _check_merges(key, sizes)
            inside = _check_merges(value, sizes)
            size += inside if key.tag == _MERGE else 1
        if size > _MOST_VALUES:
            refuse("YAML", f"has more than {_MOST_VALUES} values, or merges a mapping into itself; write less.")
    sizes[id(node)] = size
    return size


set_loader("yaml", parse_yaml, exceptions=(yaml.YAMLError,))


def read_yaml(owner: str, path: Any) -> Any:
    """Read a YAML file.

    Args:
        owner: Named in the error message.
        path: Of the file; anything with ``read_text``.

    Raises:
        ValueError: If it is not UTF-8, not valid, nested too deeply, or has too many values.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        refuse(owner, "is not text in UTF-8; give a YAML file.")
    except yaml.YAMLError as error:
        refuse(owner, f"is not valid YAML ({' '.join(str(error).split())}).")

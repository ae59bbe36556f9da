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
        content = _loader(text)
    except RecursionError:
        refuse("YAML", "is nested too deeply; write it flatter.")
    named_values("YAML", content, most=_MOST_VALUES)
    return content


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

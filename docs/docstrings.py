"""Read our docstrings as the reference pages need them."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Show ``Example:`` as griffe shows ``Examples:``, the only name by which it knows a section of code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

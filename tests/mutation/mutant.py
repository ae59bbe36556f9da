"""What a mutant is."""

from dataclasses import dataclass
from pathlib import Path

PACKAGE = "mtp_modules"
ROOT = Path(__file__).parents[2]
OURS = "our own"


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: Short, for the command line.
        file: Below the package's folder.
        fragment: What stands there now, exactly once.
        replacement: The bug.
        what: What goes wrong, in a few words.
        seen_in: The issues where others met it.
        killers: Node ids below ``tests`` of the tests that must fail.
    """

    name: str
    file: str
    fragment: str
    replacement: str
    what: str
    seen_in: str
    killers: tuple[str, ...]

    def mutated(self, source: str) -> str:
        """Return the text of the file with the bug in it.

        Args:
            source: The text without.

        Raises:
            ValueError: If the fragment does not occur exactly once.
        """
        count = source.count(self.fragment)
        if count != 1:
            raise ValueError(
                f"{self.name}: the fragment must occur exactly once in {self.file}, it occurs {count} times."
            )
        return source.replace(self.fragment, self.replacement)

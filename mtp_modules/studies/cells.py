"""The configurations of a study, built from the base run by overrides."""

import copy
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from mtp_modules.core.checks import at_least, refuse

SECTIONS = ("model", "data", "trainer")
TRAINER_OPTIONS = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "precision")
OWN = ("match", "share")
MATCHES = ("data", "flops", "seconds")


@dataclass(frozen=True)
class Cell:
    """One arm at one value of the sweep: the configuration of runs that differ in the seed only.

    Attributes:
        sections: ``model``, ``data`` and ``trainer``, as in the YAML of ``fit``.
        match: The quantity that its runs match with the first arm: data, flops or seconds.
        share: Fraction of that quantity.
        tests: Overrides of the data for additional evaluations at the end, by name.
        arm: Name of the arm.
        value: Value of the sweep, or ``None``.
        is_helper: Whether other arms need its model.
    """

    sections: dict[str, dict[str, Any]]
    match: str
    share: float = 1.0
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    arm: str = ""
    value: int | float | None = None
    is_helper: bool = False

    @property
    def label(self) -> str:
        """Name of the cell in messages."""
        return self.arm if self.value is None else f"{self.arm} at {self.value}"

    @property
    def needs(self) -> set[str]:
        """Names of the helpers whose checkpoints the cell uses."""
        return set(_helpers(self.sections))

    def named(self, arm: str, value: int | float | None, *, is_helper: bool) -> "Cell":
        """Return the cell with its arm and sweep value set."""
        return replace(self, arm=arm, value=value, is_helper=is_helper)

    def changed(self, overrides: dict[str, Any], owner: str) -> "Cell":
        """Return the cell with overrides applied.

        Args:
            overrides: Dotted keys and their values. ``match`` and ``share`` set the cell's attributes; all other keys
                begin with a section.
            owner: Source of the overrides, for messages.

        Raises:
            ValueError: If a key does not begin with a section or leads through a plain value, or if a value is invalid.
        """
        sections, own = copy.deepcopy(self.sections), {}
        for key, value in overrides.items():
            if key in OWN:
                own[key] = value
            else:
                _put(sections, key, copy.deepcopy(value), owner)
        changed = replace(self, sections=sections, **own)
        _check(changed, owner)
        return changed

    def seeded(self, seed: int, helpers: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Return the sections of one run.

        Args:
            seed: Seed of the run, and of its data unless the study fixes that.
            helpers: Paths of the helpers' checkpoints.
        """
        sections: dict[str, dict[str, Any]] = _filled(self.sections, helpers)
        sections["data"].setdefault("init_args", {}).setdefault("seed", seed)
        return sections


def base_cell(base: dict[str, Any], *, match: str, tests: dict[str, dict[str, Any]], owner: str) -> Cell:
    """Return the cell of the base run.

    Args:
        base: Sections ``model`` and ``data``, and optionally ``trainer``.
        match: The quantity that runs match.
        tests: Overrides of the data for additional evaluations.
        owner: Name of the study, for messages.

    Raises:
        ValueError: If a section is missing or unknown.
    """
    for name in ("model", "data"):
        if not isinstance(base.get(name), dict):
            refuse(owner, f"base needs a section {name!r}, as in the YAML of fit.")
    for name in base:
        if name not in SECTIONS:
            refuse(owner, f"base has no section {name!r}. Known: {', '.join(SECTIONS)}.")
    for name, overrides in tests.items():
        for key in overrides:
            if not key.startswith("data."):
                refuse(f"test {name!r}", f"can override the data only, got {key!r}.")
    cell = Cell(sections={"trainer": {}, **copy.deepcopy(base)}, match=match, tests=tests)
    _check(cell, owner)
    return cell


def expand(arms: dict[str, Any], owner: str) -> dict[str, dict[str, Any]]:
    """Expand every ``{each: [...]}`` into one arm per value, and into all combinations if there are several.

    The arm's name contains the placeholder ``{last part of the key}``. Values that are not numbers or words need
    labels: ``{each: {label: value}}``.

    Args:
        arms: Overrides by name.
        owner: ``arms``, ``helpers`` or ``tests``, for messages.

    Raises:
        ValueError: If a name has no placeholder for a value, or two arms get the same name.

    Example:
        >>> expand({"N = {n}": {"model.n": {"each": [1, 2]}}}, "arms")
        {'N = 1': {'model.n': 1}, 'N = 2': {'model.n': 2}}
    """
    expanded: dict[str, dict[str, Any]] = {}
    for name, overrides in arms.items():
        if not isinstance(overrides, dict):
            refuse(owner, f"{name!r} must be a mapping of keys to values, got {overrides!r}; {{}} changes nothing.")
        choices = []
        for key, value in overrides.items():
            each = _each(value)
            slot = "{" + key.rpartition(".")[2] + "}"
            if each is not None and slot not in name:
                refuse(owner, f"{name!r} gives {key} several values; put {slot} into the name.")
            choices.append([(key, slot, "", value)] if each is None else [(key, slot, *pair) for pair in each])
        for chosen in itertools.product(*choices):
            label = name
            for _, slot, word, _ in chosen:
                label = label.replace(slot, word) if word else label
            if label in expanded:
                refuse(owner, f"{label!r} is defined twice; give each arm another name.")
            expanded[label] = {key: value for key, _, _, value in chosen}
    return expanded


def _each(value: Any) -> list[tuple[str, Any]] | None:
    if not isinstance(value, dict) or set(value) != {"each"}:
        return None
    given = value["each"]
    pairs = given.items() if isinstance(given, dict) else [(item, item) for item in given]
    return [(str(label), item) for label, item in pairs]


def _put(sections: dict[str, Any], key: str, value: Any, owner: str) -> None:
    first, *rest = key.split(".")
    if first not in SECTIONS or not rest:
        known = ", ".join([*(f"{name}.KEY" for name in SECTIONS), *OWN])
        refuse(owner, f"cannot set {key!r}. Known: {known}.")
    inner = sections[first]
    for part in rest[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            refuse(owner, f"cannot set {key!r}: {part!r} is {inner!r} in the base, not a mapping.")
    inner[rest[-1]] = value


def _check(cell: Cell, owner: str) -> None:
    if cell.match not in MATCHES:
        refuse(owner, f"match must be one of {', '.join(MATCHES)}, got {cell.match!r}.")
    at_least(owner, "share", cell.share, 0)
    for option in cell.sections["trainer"]:
        if option not in TRAINER_OPTIONS:
            refuse(owner, f"trainer options of a study are {', '.join(TRAINER_OPTIONS)}, got {option!r}.")


def _helpers(value: Any) -> list[str]:
    if isinstance(value, dict):
        if set(value) == {"helper"}:
            return [str(value["helper"])]
        return [name for item in value.values() for name in _helpers(item)]
    return [name for item in value for name in _helpers(item)] if isinstance(value, list) else []


def _filled(value: Any, helpers: dict[str, str]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"helper"}:
            return helpers[value["helper"]]
        return {key: _filled(item, helpers) for key, item in value.items()}
    return [_filled(item, helpers) for item in value] if isinstance(value, list) else value

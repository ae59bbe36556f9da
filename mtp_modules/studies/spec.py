"""The specification of a study, read from YAML: question, base run, arms, figures, tables and verdicts."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml

from mtp_modules.configuration import read_yaml
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.studies.cells import OWN, Cell, base_cell, expand

Match = Literal["data", "flops", "seconds"]


@dataclass(frozen=True)
class Sweep:
    """A second dimension: every arm is run at each value.

    Attributes:
        key: The key to set, such as ``data.init_args.num_train``; ``share`` sets a fraction of the length.
        label: Axis label in figures.
        values: Numbers in ascending order.
    """

    key: str
    label: str
    values: list[int | float]


@dataclass(frozen=True)
class Decode:
    """Settings of the greedy decoding at the end of a run.

    Attributes:
        prompts: Number of held-out rows that serve as prompts.
        prompt_length: Number of tokens of each prompt.
        distances: Number of tokens to generate and compare with the true text.
        new_tokens: Number of tokens to generate for the speed measurement; 0 disables it.
    """

    prompts: int = 64
    prompt_length: int = 8
    distances: int = 8
    new_tokens: int = 0


@dataclass(frozen=True)
class Study:
    """A study. Its YAML has these attributes as keys; the page "Studies" explains each with an example.

    Attributes:
        question: The question that the study answers.
        claim: The claim that it tests.
        base: Sections ``model``, ``data`` and ``trainer`` of a run, as in the YAML of ``fit``.
        arms: Overrides of the base, by name. The first arm is the baseline of all comparisons.
        steps: Optimizer steps of the first arm.
        match: The quantity that all arms match: data, flops or seconds.
        seeds: Number of runs of each arm.
        minutes: Budget in minutes, to which lengths are scaled down; no limit if ``None``.
        sweep: A second dimension.
        helpers: Runs that are trained first. An arm uses one by ``{helper: NAME}`` in place of a checkpoint's path.
        tests: Additional evaluations at the end: overrides of the data, by name.
        points: Number of evaluations of a run, evenly spaced; the last one is the result.
        decode: Settings of the decoding at the end; no decoding if ``None``.
        figures: Kinds and arguments of the figures.
        tables: Kinds and arguments of the tables.
        verdicts: Kinds and arguments of the sentences that answer the question.
        name: Name of the study.
    """

    question: str
    claim: str
    base: dict[str, Any]
    arms: dict[str, Any]
    steps: int
    match: Match = "data"
    seeds: int = 3
    minutes: float | None = None
    sweep: Sweep | None = None
    helpers: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    points: int = 10
    decode: Decode | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    name: str = "study"

    def __post_init__(self) -> None:
        for number, value in (("steps", self.steps), ("seeds", self.seeds), ("points", self.points)):
            at_least(self.name, number, value, 1)
        if not self.arms:
            refuse(self.name, "arms is empty; give at least one arm.")
        if self.sweep is not None and not self.sweep.values:
            refuse(self.name, "sweep.values is empty; give at least one value, or omit sweep.")
        for name in self.helpers.keys() & self.arms.keys():
            refuse(self.name, f"{name!r} is both an arm and a helper; rename one of them.")

    @property
    def sweep_values(self) -> list[int | float | None]:
        """Values of the sweep; ``[None]`` without a sweep."""
        return [None] if self.sweep is None else list(self.sweep.values)

    @property
    def arm_names(self) -> list[str]:
        """Names of the arms, in order, with every ``each`` expanded."""
        return list(dict.fromkeys(cell.arm for cell in self.cells()))

    def changed_lines(self, arm: str) -> int:
        """Return the number of YAML lines by which an arm and its helpers differ from the base.

        Settings of the run's length are not counted.

        Args:
            arm: Name of the arm.
        """
        (cell,) = [cell for cell in self.cells() if cell.arm == arm and cell.value == self.sweep_values[-1]]
        helpers = expand(self.helpers, "helpers")
        changes = [expand(self.arms, "arms")[arm], *(helpers[name] for name in sorted(cell.needs))]
        texts = (yaml.safe_dump({key: given}) for change in changes for key, given in change.items() if key not in OWN)
        return sum(len(text.splitlines()) for text in texts)

    def cells(self) -> list[Cell]:
        """Return one cell per arm and sweep value, in order of the arms.

        Raises:
            ValueError: If an override is invalid, or a helper is unknown.
        """
        return list(self._expanded(self.arms, helper=False))

    def helper_cells(self) -> list[Cell]:
        """Return one cell per helper and sweep value."""
        return list(self._expanded(self.helpers, helper=True))

    def _expanded(self, arms: dict[str, Any], *, helper: bool) -> Iterator[Cell]:
        base = base_cell(self.base, match=self.match, tests=expand(self.tests, "tests"), owner=self.name)
        for arm, overrides in expand(arms, "helpers" if helper else "arms").items():
            for value in self.sweep_values:
                cell = base.changed({} if self.sweep is None else {self.sweep.key: value}, "sweep")
                cell = cell.changed(overrides, f"arm {arm!r}").named(arm, value, is_helper=helper)
                unknown = sorted(cell.needs - self.helpers.keys())
                if unknown or (helper and cell.needs):
                    known, wanted = ", ".join(self.helpers) or "none", ", ".join(unknown or cell.needs)
                    refuse(f"arm {arm!r}", f"needs helper {wanted!r}. Only arms can use helpers; known: {known}.")
                yield cell


def shipped() -> dict[str, Traversable]:
    """Return the studies of this package, by name."""
    files = resources.files("mtp_modules.studies").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def load_study(name: str) -> Study:
    """Read a study.

    Args:
        name: Name of a study of this package, or the path of a YAML file.

    Raises:
        ValueError: If no study has this name, or the file is not a valid study.
    """
    known = shipped()
    source = known.get(name, Path(name))
    if name not in known and not (name.endswith((".yaml", ".yml")) and source.is_file()):
        refuse("study", f"there is no study {name!r}. Known: {', '.join(known)}; or give the path of a YAML file.")
    content = read_yaml(name, source)
    if not isinstance(content, dict):
        refuse(name, f"must be a mapping with question, claim, base, arms and steps, got {type(content).__name__}.")
    return cast(Study, _made(Study, {**content, "name": Path(name).stem}, ""))


def _made(cls: type, content: dict[str, Any], place: str) -> Any:
    """Build a dataclass from plain values; errors name the place in the YAML."""
    hints, known = get_type_hints(cls), fields(cls)
    shown = ", ".join(attribute.name for attribute in known if attribute.name != "name")
    for key in content.keys() - {attribute.name for attribute in known}:
        refuse("study", f"unknown key {place + str(key)!r}. Known: {shown}.")
    for attribute in known:
        if attribute.name not in content and attribute.default is attribute.default_factory is MISSING:
            refuse("study", f"needs the key {place + attribute.name!r}.")
    return cls(**{key: _fitting(hints[key], value, place + key) for key, value in content.items()})


def _fitting(hint: Any, value: Any, place: str) -> Any:
    """Return a value converted to its type hint."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for choice in choices:
        plain = get_origin(choice) or choice
        if is_dataclass(choice) and isinstance(value, dict):
            return _made(cast(type, choice), value, f"{place}.")
        if plain is Literal and value in get_args(choice):
            return value
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(plain, type) and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(_word(choice) for choice in choices)
    refuse("study", f"{place} must be {wanted}, got {value!r}.")


def _word(hint: Any) -> str:
    """Return the name of a type in YAML's terms."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    words = {str: "a string", int: "an integer", float: "a number", NoneType: "null", list: "a list"}
    return words.get(get_origin(hint) or hint, "a mapping")

"""Components that record their constructor arguments, so that a checkpoint can describe its model.

Every component's constructor takes only plain values and other components. The arguments are recorded as plain values,
``describe`` returns the record, and ``build`` constructs the same object again. A description is data: it can be
written as JSON and loaded without unpickling.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, SupportsFloat, TypeAlias

import torch

from mtp_modules.core.budget import Budget, named_values
from mtp_modules.core.checks import InputError, refuse, whole

Description: TypeAlias = dict[str, Any]
"""``{"class_path": "package.module.Class", "init_args": {...}}``, nested."""

_KEY = "_description"


class Component:
    """Base of everything that is configured by name and arguments.

    Its description is in a slot, so ``vars`` holds only the attributes that the component's own constructor has set.
    Copies and pickles include the description.
    """

    __slots__ = ("_description",)

    _description: Description

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes and the description."""
        return {**vars(self), **({} if (recorded := _recorded(self)) is None else {_KEY: recorded})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore both.

        Args:
            state: Result of ``__getstate__``.
        """
        attributes = dict(state)
        if (recorded := attributes.pop(_KEY, None)) is not None:
            _record(self, recorded)
        base = getattr(super(), "__setstate__", vars(self).update)  # torch modules define their own
        base(attributes)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Record the arguments of the class's own constructor."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @classmethod
    def check_stored(cls, arguments: Mapping[str, Any]) -> None:
        """Raise an error for arguments with which a description from a file would read another file or the network.

        A class whose constructor reads a file or names a model overrides it.

        Args:
            arguments: Constructor arguments in the description.

        Raises:
            ValueError: If an argument names a file or a model.
        """


def _recording(init: Any) -> Any:
    parameters = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Component, *args: Any, **kwargs: Any) -> None:
        outermost = _recorded(self) is None
        if outermost:
            try:
                bound = parameters.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: {error}") from None
            for name, value in bound.arguments.items():
                bound.arguments[name] = _number(self, name, value, parameters.parameters[name].annotation)
            args, kwargs = bound.args[1:], bound.kwargs
            bound.apply_defaults()  # so that later changes of defaults do not affect a checkpoint
            given = {name: _plain(value) for name, value in list(bound.arguments.items())[1:]}
            class_path = f"{type(self).__module__}.{type(self).__qualname__}"
            _record(self, {"class_path": class_path, "init_args": given})
        init(self, *args, **kwargs)
        if outermost:  # what the constructor itself says of a number comes first
            for name, value in bound.arguments.items():
                if isinstance(value, float) and not math.isfinite(value):
                    refuse(self, f"{name} must be finite, got {value}.")

    return wrapper


def _number(owner: Component, name: str, value: Any, annotation: Any) -> Any:
    """Return a plain number where the annotation wants one, so that numbers of numpy are described as such."""
    if annotation in (bool, str) and not isinstance(value, annotation):
        refuse(owner, f"{name} must be {'true or false' if annotation is bool else 'a string'}, got {value!r:.60}.")
    whole_only = annotation in (int, int | None)
    if whole_only and isinstance(value, bool):
        refuse(owner, f"{name} must be a whole number, got {value}.")
    if value is None or isinstance(value, bool) or not (whole_only or annotation in (float, float | None)):
        return value
    if whole_only:
        return whole(owner, name, value)
    if not isinstance(value, int | SupportsFloat) or isinstance(value, str):
        refuse(owner, f"{name} must be a number, got {value!r}.")
    return value if isinstance(value, int) else float(value)


def _recorded(component: Component) -> Description | None:
    """Return the recorded description, if there is one."""
    found: Description | None = getattr(component, _KEY, None)
    return found


def _record(component: Component, description: Description) -> None:
    object.__setattr__(component, _KEY, description)  # also works for frozen components


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return _recorded(value) or describe(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    plain = str(value)
    return plain if isinstance(value, PurePath | torch.dtype | torch.device) else _Indescribable(plain)


class _Indescribable(str):
    """Text of an argument that cannot be built again from it."""

    __slots__ = ()


def check_describable(owner: object, component: Component) -> None:
    """Raise an error for a component that no file can describe, because an argument is neither plain nor a component.

    Args:
        owner: Named in the error message.
        component: Would be saved.

    Raises:
        ValueError: If it, or a component within it, was given such an argument.
    """
    waiting: list[Any] = [_recorded(component)]
    while waiting:
        described = waiting.pop()
        if not isinstance(described, Mapping):
            waiting += described if isinstance(described, list) else []
            continue
        waiting += described.values()
        for name, value in described.get("init_args", {}).items() if "class_path" in described else ():
            parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
            if any(isinstance(part, _Indescribable) for part in parts):
                kind, shown = str(described["class_path"]).rpartition(".")[2], " ".join(str(value).split())
                refuse(
                    owner,
                    f"{kind} was made with {name}={shown:.60}, which no file can describe; give its constructor sizes "
                    f"and names, and let it build its {name} itself, so that a saved model can be built again.",
                )


def redescribe(component: Component, **arguments: Any) -> None:
    """Replace recorded arguments of a component by others, with which it can be built on another machine.

    Args:
        component: Usually called by its own constructor.
        arguments: Constructor arguments; the others do not change.
    """
    recorded = _recorded(component) or describe(component)
    plain = {name: _plain(value) for name, value in arguments.items()}
    _record(component, {"class_path": recorded["class_path"], "init_args": {**recorded["init_args"], **plain}})


def describe(component: Component) -> Description:
    """Return the class and the constructor arguments of a component as plain values.

    Args:
        component: Any component of this package, or of another that follows its rules.

    Raises:
        ValueError: If the object has no constructor of its own to describe.
    """
    description = _without_marks(_recorded(component))
    if description is None:
        class_path = f"{type(component).__module__}.{type(component).__qualname__}"
        description = {"class_path": class_path, "init_args": {}}
    return description


def _without_marks(value: Any) -> Any:
    """Return a copy of a description, of plain values only."""
    if isinstance(value, Mapping):
        return {name: _without_marks(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_marks(item) for item in value]
    return str(value) if isinstance(value, _Indescribable) else value


def build(description: Description, *, trusted: Sequence[str] = ("mtp_modules",), role: type = Component) -> Any:
    """Construct a component from its description.

    A description may come from an untrusted source, so only classes of ``trusted`` packages are imported, and none may
    read a file (:meth:`Component.check_stored`).

    Args:
        description: Result of ``describe``.
        trusted: Top-level packages whose classes may be built.
        role: Class that the component must have.

    Raises:
        ValueError: If a class lies outside the trusted packages, does not exist, is of another role, or rejects its
            arguments.
    """
    named_values("build", description)
    return _build(description, trusted, role)


def build_within(
    shapes: Mapping[str, Sequence[int]], owner: str, description: Description, *, trusted: Sequence[str], role: type
) -> Any:
    """Construct the module that comes with weights, if they can fill it.

    Args:
        shapes: Shapes of the stored weights by name.
        owner: Named in the error message.
        description: Result of ``describe``.
        trusted: See :func:`build`.
        role: See :func:`build`.

    Raises:
        ValueError: See :func:`build`; also if the description asks for more than is stored.
    """
    with Budget(owner, list(shapes.values())) as budget:
        budget.check_counts(description)
        return build(description, trusted=trusted, role=role)


def class_paths(description: Description) -> set[str]:
    """Return the paths of all classes in a description.

    Args:
        description: Result of ``describe``, or from a file.

    Raises:
        ValueError: If it is nested too deeply.
    """
    return {str(value) for name, value in named_values("description", description) if name == "class_path"}


def _build(description: Any, trusted: Sequence[str], role: type) -> Any:
    if not isinstance(description, Mapping):
        refuse("build", f"{description!r:.60} describes no component.")
    class_path = str(description.get("class_path", ""))
    module_name, _, class_name = class_path.rpartition(".")
    if module_name.partition(".")[0] not in trusted:
        refuse(
            "build",
            f"class {class_path!r} is not from a trusted package ({', '.join(trusted)}); "
            "pass trusted=(...) if you know its origin.",
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, RecursionError) as error:
        refuse("build", f"there is no class {class_path!r:.200} in this version of the package ({error}).")
    if not (isinstance(cls, type) and issubclass(cls, Component)):
        refuse("build", f"{class_path!r} is not a component.")
    if not issubclass(cls, role):
        refuse("build", f"{class_path!r} is not a {role.__name__}.")
    stored = description.get("init_args", {})
    if not isinstance(stored, Mapping):
        refuse("build", f"the arguments of {class_path!r} have no names.")
    cls.check_stored(stored)
    arguments = {str(name): _built(value, trusted) for name, value in stored.items()}
    try:
        return cls(**arguments)
    except InputError:
        raise
    except Exception as error:  # values of a wrong type fail anywhere
        refuse("build", f"{class_path!r} does not take the arguments {sorted(arguments)} ({error!s:.200}).")


def _built(value: Any, trusted: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        if "class_path" in value:
            return _build(value, trusted, Component)
        return {key: _built(item, trusted) for key, item in value.items()}
    if isinstance(value, list):
        return [_built(item, trusted) for item in value]
    return value

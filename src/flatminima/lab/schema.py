"""Dataclasses that check themselves, and their JSON: pydantic's, with our errors of one line.

A class says what its fields may be (types, ``Field(gt=0)``, a ``__post_init__`` for what concerns several of them) and
is declared by pydantic's ``dataclass`` with :data:`STRICT` or :data:`RECORD`. :func:`refusing` gives its constructor
our errors; :func:`parse` reads one from JSON, whatever the text may be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_serializer, model_validator

from flatminima.errors import FlatminimaError, one_line

Kind = TypeVar("Kind")

RECORD = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")
"""Every field is there, of its own type (no text for a number, no True for an int; an int becomes a float)."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Likewise, and every float is finite."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""How many there are of something."""

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
_SHOWN = 80  # characters of a wrong value that a message repeats


def parse(kind: type[Kind], text: str, *, strict: bool | None = None, **known: Any) -> Kind:
    """The ``kind`` that is written in ``text`` as JSON.

    Args:
        kind: A dataclass, or a type of its values such as ``list[Record]``.
        text: Anything.
        strict: True for dataclasses that do not say themselves how they are checked.
        known: Values of fields that the text does not hold.

    Raises:
        FlatminimaError: The text is not JSON, or not that of such a value: in one line, without the file's name.
    """
    try:
        if known:
            values = pydantic_core.from_json(text)
            text = pydantic_core.to_json({**values, **known}).decode()
        return cast(Kind, _adapter(kind).validate_json(text, strict=strict))
    except ValidationError as error:
        raise FlatminimaError(_refusal(kind, "", error)) from None
    except (ValueError, TypeError) as error:  # before pydantic sees it: no JSON, no object
        raise FlatminimaError(f"not {_name(kind)}: {one_line(error)}") from None


def plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, in their order; what :func:`parse` reads."""
    values: dict[str, Any] = _adapter(type(value)).dump_python(value, mode="json")
    return values


class Kinded:
    """One of several specifications that a field may hold: its JSON names the class as ``kind``."""

    @model_serializer(mode="wrap")
    def with_kind(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The fields and the class's name."""
        return {**serialize(self), "kind": type(self).__name__}

    @model_validator(mode="before")
    @classmethod
    def without_kind(cls, values: Any) -> Any:
        """The fields alone: the kind has been looked at when the class was chosen."""
        return {name: v for name, v in values.items() if name != "kind"} if isinstance(values, dict) else values


def kind_of(value: Any) -> Any:
    """What tells the classes of a field apart: for pydantic's ``Discriminator``."""
    return value.get("kind") if isinstance(value, dict) else type(value).__name__


def refusing(where: str = "") -> Callable[[type[Kind]], type[Kind]]:
    """Let the constructor of a pydantic dataclass raise :class:`FlatminimaError`.

    Args:
        where: What such an object is called, put before the name of a field that is out of its range.
    """

    def decorated(kind: type[Kind]) -> type[Kind]:
        construct = kind.__init__

        @functools.wraps(construct)
        def checked(self: Kind, *values: Any, **named: Any) -> None:
            try:
                construct(self, *values, **named)
            except ValidationError as error:
                raise FlatminimaError(_refusal(kind, where, error)) from None

        kind.__init__ = checked  # type: ignore[method-assign, assignment]
        return kind

    return decorated


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """One for each kind: to make one takes pydantic milliseconds."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _refusal(kind: Any, where: str, error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    what, context, value = first["type"], first.get("ctx", {}), first["input"]
    if what == "value_error":  # of our own checks
        return one_line(context["error"])
    if what == "json_invalid":
        return f"not {_name(kind)}: {context['error']}"
    owner, path = _place(kind, first["loc"])
    if not path:
        return f"not {_name(kind)}: {_shown(value)}"
    field = path[-1]
    if what.startswith(("unexpected", "missing")):
        has = "no field" if what.startswith("unexpected") else "no value for its field"
        return f"{_name(owner)} has {has} {_shown(field)[1:-1]}; was it written by another version?"
    hint = get_type_hints(owner)[field]
    if what.startswith("union_tag") and isinstance(value, dict):
        names = ", ".join(option.__name__ for option in _types(hint) if option is not NoneType)
        return f"unknown {field}.kind {_shown(value.get('kind'))}; use one of {names}"
    if what.startswith(("greater_than", "less_than")):
        limited = get_type_hints(owner, include_extras=True)[field]
        return f"{'.'.join(filter(None, (where, *path)))} {_range(limited)}, got {_shown(value)}"
    return f"{_name(owner)}.{field} must be {_declared(hint)}, got {_shown(value)}"


def _place(kind: Any, location: Sequence[str | int]) -> tuple[Any, list[str]]:
    """The dataclass in which an error is, and the fields that lead to it, the last one its own."""
    holder: Any = kind
    path: list[str] = []
    inside, hint = (kind, None) if dataclasses.is_dataclass(kind) else (None, kind)
    for part in location:
        if inside is None:  # from a field into what it holds
            held: dict[str, Any] = {
                _name(option): option for option in _types(hint) if dataclasses.is_dataclass(option)
            }
            if not held:
                break  # the items of a tuple, the values of a mapping
            inside = held.get(str(part), next(iter(held.values())))
            if isinstance(part, int) or part in held:
                continue
        names = [field.name for field in dataclasses.fields(inside)]
        path.append(names[part] if isinstance(part, int) and part < len(names) else str(part))
        holder, inside, hint = inside, None, get_type_hints(inside).get(path[-1])
    return holder, path


def _types(hint: Any) -> list[Any]:
    """The types in a hint, whatever they are wrapped in."""
    inner = get_args(hint)
    return [found for part in inner for found in _types(part)] if inner else [hint]


def _range(hint: Any) -> str:
    """What a number must be, in words."""
    limits = dict(_limits(hint))
    low, high = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le"))
    if low is not None and high is not None:
        return f"must be in {'(' if 'gt' in limits else '['}{low}, {high}{')' if 'lt' in limits else ']'}"
    if low != 0:
        return f"must be >= {low}"
    said = "must be positive" if "gt" in limits else "must not be negative"
    return f"{said} or None" if NoneType in _types(hint) and "gt" in limits else said


def _limits(hint: Any) -> Iterator[tuple[str, Any]]:
    for entry in getattr(hint, "__metadata__", ()):
        for limit in getattr(entry, "metadata", ()):
            yield from ((name, getattr(limit, name)) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name))
    for part in get_args(hint):
        yield from _limits(part)


def _declared(hint: Any) -> str:
    """A type as one writes it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_declared, get_args(hint)))
    if hint is NoneType:
        return "None"
    return _name(hint) if isinstance(hint, type) else str(hint).replace("typing.", "")


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a number of type {_name(type(value))}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

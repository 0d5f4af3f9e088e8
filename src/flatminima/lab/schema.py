"""Dataclasses that check themselves, and their JSON: pydantic's, with our errors of one line.

A class says what its fields may be (types, ``Field(gt=0)``, a ``__post_init__`` for what concerns several of them) and
is declared by pydantic's ``dataclass`` with :data:`STRICT` or :data:`RECORD`. :func:`refusing` gives its constructor
our errors; :func:`parse` reads one from JSON, whatever the text may be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import pydantic_core
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer, model_validator

from flatminima.errors import FlatminimaError, one_line

Kind = TypeVar("Kind")

RECORD = ConfigDict(strict=True, extra="forbid", ser_json_inf_nan="constants")
"""Every field is there, of its own type (no text for a number, no True for an int; an int becomes a float)."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Likewise, and every float is finite."""

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
_SHOWN = 80  # characters of a wrong value that a message repeats
_TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}  # pydantic's words, and Python's


def below(end: float) -> AfterValidator:
    """A range for a field: from 0 on, and less than ``end``."""

    def check(value: float) -> float:
        if not 0 <= value < end:
            raise ValueError(f"must be in [0, {end})")
        return value

    return AfterValidator(check)


Count = Annotated[int, below(2**63)]
"""How many there are of something."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, below(1)]
PositiveFraction = Annotated[float, Field(gt=0), below(1)]
Above1 = Annotated[float, Field(gt=1)]
AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]


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
        raise FlatminimaError(f"not {kind.__name__}: {one_line(error)}") from None


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
    return str(value.get("kind")) if isinstance(value, dict) else type(value).__name__


def refusing(where: str = "") -> Callable[[type[Kind]], type[Kind]]:
    """Let the constructor of a pydantic dataclass raise :class:`FlatminimaError`.

    Args:
        where: What such an object is called, put before the name of a field that is out of its range.
    """

    def decorated(kind: type[Kind]) -> type[Kind]:
        construct, names = kind.__init__, [field.name for field in dataclasses.fields(cast(Any, kind))]

        @functools.wraps(construct)
        def checked(self: Kind, *values: Any, **named: Any) -> None:
            try:
                construct(self, *values[len(names) :], **dict(zip(names, values, strict=False)), **named)
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
    what, context, got = first["type"], first.get("ctx", {}), _shown(first["input"])
    if isinstance(context.get("error"), FlatminimaError):  # of a __post_init__, which names its fields itself
        return one_line(context["error"])
    if not first["loc"]:
        return f"not {error.title}: {context.get('error', got)}"
    *within, field = (_shown(part).strip("'") for part in first["loc"])
    holder = ".".join((error.title, *within))
    if what.startswith(("unexpected", "missing")):
        has = "no field" if what.startswith("unexpected") else "no value for its field"
        return f"{holder} has {has} {field}; was it written by another version?"
    if what.startswith("union_tag") and isinstance(first["input"], dict):
        return f"unknown {field}.kind {_shown(first['input'].get('kind'))}; use one of {context['expected_tags']}"
    path = ".".join(filter(None, (where, *within, field)))
    if what == "greater_than":
        return f"{path} must be {f'> {limit}' if (limit := context['gt']) else 'positive'}, got {got}"
    if what == "greater_than_equal":
        return f"{path} must {f'be >= {limit}' if (limit := context['ge']) else 'not be negative'}, got {got}"
    if what == "value_error":
        return f"{path} {one_line(context['error'])}, got {got}"
    words = first["msg"].partition("Input should be ")[2]
    words = words.removeprefix("a valid ").removeprefix("a finite ")
    expected = context.get("expected_tags") or _TYPES.get(words, words)
    if not expected:  # of another kind
        return f"{holder}.{field}: {one_line(first['msg'])}, got {got}"
    optional = not within and dataclasses.is_dataclass(kind) and NoneType in get_args(get_type_hints(kind).get(field))
    finite = "; it must be finite" if what == "finite_number" else ""
    return f"{holder}.{field} must be {expected}{' | None' if optional else ''}, got {got}{finite}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a number of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

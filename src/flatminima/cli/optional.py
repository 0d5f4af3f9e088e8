"""Options that may be left open: shown by what they take, ``INT``, and set back to nothing by typing ``None``."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, Union, get_args

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from flatminima.cli.refusals import kinds

OPTIONAL = ConstructorRegistry()
"""The rule below, as a context in which tyro parses."""


@OPTIONAL.primitive_rule
def optional(info: PrimitiveTypeInfo) -> Any:
    """``X | None`` as ``X``, whose help then reads ``X`` and not ``{None}|X``."""
    kinds_of = get_args(info.type)
    if NoneType not in kinds_of:
        return None
    rest: Any = Union[tuple(kind for kind in kinds_of if kind is not NoneType)]  # noqa: UP007
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(rest, info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return inner
    spec = inner

    def value(given: Sequence[str]) -> Any:
        if list(given) == ["None"]:  # "none" is a word of `--normalize`
            return None
        try:
            return spec.instance_from_str(list(given))
        except ValueError:
            words = " ".join(map(repr, given))
            raise ValueError(f"{words} cannot be used, it takes {kinds(spec.metavar)} or None") from None

    return PrimitiveConstructorSpec(
        nargs=spec.nargs,
        metavar=spec.metavar,
        instance_from_str=value,
        is_instance=lambda instance: instance is None or spec.is_instance(instance),
        str_from_instance=lambda instance: ["None"] if instance is None else spec.str_from_instance(instance),
    )

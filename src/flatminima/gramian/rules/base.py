"""What a rule is, how one is registered, and what rules share.

A rule says how one use of a parameter turns (input, output gradient) into the parameter's rows of J. It is attached to
the *function* that a module calls (``F.linear``, ...), not to the module, and takes N and then the function's own
arguments. It returns a :class:`ParameterUse` for every parameter in the call, or None where it does not cover the call.
It does not cover a call with keywords that it does not take either.
To add one, make your function visible to ``torch.overrides`` and decorate its rule:

>>> import torch
>>> @torch.overrides.wrap_torch_function(lambda x, slope: (x, slope))
... def slope_times_square(x, slope):
...     return slope * x.square()
>>> @rule(slope_times_square)
... def rule_of_slope(n, x, slope):  # x is (N, features), or (N, T, features), slope (features,)
...     def rows(grad, start, stop):
...         return positions(grad * x.square(), n).sum(1)[:, start:stop]
...     return [ParameterUse(slope, rows, reads=x)]
>>> del RULES[slope_times_square]

Throughout, N is the number of samples and a tensor's first dimension is N, or N·T with the T positions of one sample
side by side. Every rule is held against plain autograd when it is used, so a wrong one is an error, not a wrong number.
More in ``docs/ideas/rules.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from flatminima.errors import require
from flatminima.torch_compat import is_visible_to_function_modes

Rows = Callable[[Tensor, int, int], Tensor]

Product = Callable[[Tensor, int, int], Tensor]

PutBack = Callable[[Tensor], Tensor]


@dataclass
class ParameterUse:
    """One use of one parameter in the forward pass.

    Attributes:
        parameter: the parameter (any tensor stands here while a rule runs; the recorder keeps the trainable ones).
        rows: ``rows(grad, start, stop)`` → this use's part of J for ``parameter[start:stop]``: (N, stop − start, ...).
            ``grad`` is the gradient at the call's output.
        reads: the activation that ``rows`` will read, if any; overwriting it in place before then is an error.
        product: ``product(grad, start, stop)`` → (N, N), the JJᵀ of those rows without forming them, where that is
            cheaper. Only valid when the parameter has no other use.
        added: ``added(total, grad, start, stop)`` → ``total + rows(grad, start, stop)``, where few rows are not zero.
    """

    parameter: Tensor
    rows: Rows
    reads: Tensor | None = None
    product: Product | None = None
    added: Callable[[Tensor, Tensor, int, int], Tensor] | None = None


Rule = Callable[..., "list[ParameterUse] | None"]
"""``rule(n, *args, **kwargs)``, called with the function's own arguments."""

Extraction = Callable[..., "tuple[Tensor, PutBack] | None"]
"""``extraction(*args, **kwargs)`` → the tensor that entries were taken out of, and how rows of J go back into it."""

Split = Callable[..., Any]
"""Called with the function's own arguments, gives what the function gives; None for a call that it does not cover."""

RULES: dict[Callable[..., Any], Rule] = {}
"""The functions whose parameters have a rule, from :func:`rule`."""

POSITIONWISE: dict[Callable[..., Any], bool] = {}
"""Whether a function with a rule does to every position of its first argument the same: see :func:`rule`."""

EXTRACTS: dict[Callable[..., Any], Extraction] = {}
"""Functions that take entries out of a tensor without looking at the samples, from :func:`extract`."""

SPLITS: dict[Callable[..., Any], Split] = {}
"""Functions that hide calls with rules from the recorder, and the same as calls that it sees, from :func:`split`."""

RuleT = TypeVar("RuleT", bound=Rule)
ExtractionT = TypeVar("ExtractionT", bound=Extraction)
SplitT = TypeVar("SplitT", bound=Split)


def rule(
    *functions: Callable[..., Any], commutative: bool = False, positionwise: bool = False
) -> Callable[[RuleT], RuleT]:
    """Register the decorated function as the rule for ``functions``, in place of any that they had.

    Args:
        functions: as calls name them: ``torch.add`` and ``torch.Tensor.add`` are two.
        commutative: the parameter may be either of the first two arguments; the rule is written for the second.
        positionwise: the function does the same at every place of its first argument's leading dimensions, so that
            these may be moved: the rule then also serves where the samples lie on another dimension than the first.

    Raises:
        FlatminimaError: for a function whose calls PyTorch does not show, so that a rule for it would never be used.
    """
    _require_visible(functions)

    def register(decorated: RuleT) -> RuleT:
        RULES.update(dict.fromkeys(functions, _on_either_side(decorated) if commutative else decorated))
        POSITIONWISE.update(dict.fromkeys(functions, positionwise))
        return decorated

    return register


def extract(*functions: Callable[..., Any]) -> Callable[[ExtractionT], ExtractionT]:
    """Register the decorated function for ``functions`` that take entries out of a parameter.

    What they return then counts as a parameter itself, and its rows of J go back to where the entries came from.
    """
    _require_visible(functions)

    def register(decorated: ExtractionT) -> ExtractionT:
        EXTRACTS.update(dict.fromkeys(functions, decorated))
        return decorated

    return register


def split(*functions: Callable[..., Any]) -> Callable[[SplitT], SplitT]:
    """Register the decorated function to be called in the place of ``functions``, whose inner calls are not seen."""
    _require_visible(functions)

    def register(decorated: SplitT) -> SplitT:
        SPLITS.update(dict.fromkeys(functions, decorated))
        return decorated

    return register


@contextmanager
def temporary_rules() -> Iterator[None]:
    """Put all rules back at the end that there were at the beginning, whatever was registered or removed between."""
    tables: tuple[dict[Any, Any], ...] = (RULES, POSITIONWISE, EXTRACTS, SPLITS)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def _require_visible(functions: Iterable[Any]) -> None:
    for function in functions:
        name = getattr(function, "__name__", None) or repr(function)
        require(
            callable(function),
            f"a rule is registered for a function itself, as torch.nn.functional.linear, got {function!r}",
        )
        require(
            is_visible_to_function_modes(function),
            f"PyTorch does not show calls of {name} ({type(function).__name__}), so a rule for it would never be used: "
            "put it into a Python function decorated with torch.overrides.wrap_torch_function and register that, or "
            "register the functions that it calls (of a custom operator, torch.ops.<namespace>.<name>.default)",
        )


def _on_either_side(decorated: Rule) -> Rule:
    """The rule for a commutative function, with the parameter on either side."""

    def either_side(n: int, input: Any, other: Any, **kwargs: Any) -> list[ParameterUse] | None:
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        return [*(decorated(n, input, other, **kwargs) or []), *(decorated(n, other, input, **kwargs) or [])]

    return either_side


def bias_use(bias: Tensor | None, n: int, *, channel_last: bool) -> list[ParameterUse]:
    """A bias that is added along the channels: its rows are the output gradient, summed over positions."""
    if bias is None:
        return []

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        if channel_last:
            return positions(grad, n)[:, :, start:stop].sum(1)
        return sum_channels(grad[:, start:stop], n)

    return [ParameterUse(bias, rows)]


def positions(values: Tensor, n: int) -> Tensor:
    """(N, T, features): every leading dimension but the samples' folded into T."""
    return values.reshape(n, -1, values.shape[-1])


def sum_positions(rows: Tensor, n: int) -> Tensor:
    """(N·T, ...) → (N, ...): the sum over the T positions of each sample."""
    return rows if rows.shape[0] == n else rows.reshape(n, -1, *rows.shape[1:]).sum(1)


def sum_channels(values: Tensor, n: int) -> Tensor:
    """(N·T, C, ...) → (N, C): the sum over everything but samples and channels."""
    return sum_positions(values.flatten(2).sum(2) if values.dim() > 2 else values, n)

"""A landscape's numbers: as JSON, as a tensor, as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, needing, one_line, require, require_one_of
from flatminima.measures import jsonable

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes

DirectionKind = Literal["random", "hessian", "between"]


@dataclass(frozen=True)
class Landscape:
    """The mean loss on a grid around a minimum.

    Attributes:
        directions: which ones: see :func:`landscape`.
        coordinates: along each direction, in units of its length; the minimum is at 0.
        losses: at every grid point, the first direction's coordinate varying slowest; NaN where it is not finite.
        accuracies: likewise the fraction classified rightly; empty for losses that classify nothing.
        eigenvalues: of ``"hessian"``, each direction's: the loss's second derivative along it; else empty.
    """

    directions: DirectionKind
    coordinates: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] = ()
    eigenvalues: tuple[float, ...] = ()

    @property
    def points(self) -> int:
        """How many the grid has."""
        return math.prod(map(len, self.coordinates))

    def to_tensor(self) -> Tensor:
        """The losses in float64, with a dimension for each direction: (steps,) or (steps, steps)."""
        return torch.tensor(self.losses, dtype=torch.float64, device="cpu").reshape(
            [len(axis) for axis in self.coordinates]
        )

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """The loss as a curve, or as contours of equal ratios; the minimum and the others are marked (matplotlib).

        Args:
            ax: where to draw (None: a new figure of a column's width).

        Raises:
            FlatminimaError: without matplotlib, if no loss is finite, or if none of a plane's is positive.
        """
        require(any(map(math.isfinite, self.losses)), "no loss of this landscape is finite: there is nothing to draw")
        if len(self.coordinates) == 2:
            require(
                any(0 < loss < math.inf for loss in self.losses),
                "no loss of this landscape is positive, and a plane is drawn on a logarithmic scale: draw "
                "`to_tensor()` on another one",
            )
        with needing("plot", "a picture"):
            from flatminima.pictures import drawn
        return drawn(lambda axes: _draw(axes, self), 5 if len(self.coordinates) == 1 else 8, ax)

    def to_json(self) -> str:
        """One JSON object; NaN becomes null."""
        return json.dumps(jsonable(dataclasses.asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Landscape:
        """The inverse of :meth:`to_json`.

        Raises:
            FlatminimaError: if ``text`` is no landscape.
        """
        try:
            found = landscape_from(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FlatminimaError(f"not a landscape: {what_is_wrong(error)}") from None
        require(
            len(found.losses) == found.points,
            f"not a whole landscape: {len(found.losses)} losses for {found.points} grid points; if it was begun with "
            "`path`, the same call with the same path goes on",
        )
        return found


def landscape_from(values: Mapping[str, Any]) -> Landscape:
    """A landscape of what its JSON holds; not all points need be done.

    Raises:
        ValueError: like ``TypeError``, ``AttributeError`` and ``KeyError``, for other values.
    """
    require_one_of("directions", values["directions"], get_args(DirectionKind))
    coordinates = tuple(_read_numbers(axis) for axis in values["coordinates"])
    losses, accuracies = _read_numbers(values["losses"]), _read_numbers(values["accuracies"])
    require(len(coordinates) in (1, 2), f"it has {len(coordinates)} directions, not one or two")
    eigenvalues = _read_numbers(values.get("eigenvalues", ()))  # which came later
    found = Landscape(values["directions"], coordinates, losses, accuracies, eigenvalues)
    require(len(losses) <= found.points, f"it has {len(losses)} losses for {found.points} grid points")
    require(len(accuracies) in (0, len(losses)), f"it has {len(accuracies)} accuracies for {len(losses)} losses")
    return found


def what_is_wrong(error: Exception) -> str:
    """What :func:`landscape_from` raised, in one line."""
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)


def _draw(axes: Axes, found: Landscape) -> None:
    import numpy as np

    from flatminima.palette import INK, SERIES

    losses = found.to_tensor().numpy()
    losses = np.where(np.isfinite(losses), losses, np.nan)
    unit = "way to the other" if found.directions == "between" else "direction"
    if len(found.coordinates) == 1:
        axes.plot(found.coordinates[0], losses, color=SERIES[0], lw=1)
        axes.set_xlabel(f"{unit}, the minimum is at 0")
        axes.set_ylabel("mean loss")
        for end in (0.0, 1.0) if found.directions == "between" else (0.0,):
            axes.axvline(end, color=INK, lw=0.5, ls=":")
        return
    logarithms = np.log10(np.where(losses > 0, losses, np.nan))
    lowest, highest = np.nanmin(logarithms), np.nanmax(logarithms)
    levels = np.linspace(lowest, max(highest, lowest + 1e-6), 12)  # contours of a plane that is flat need some, too
    # the first direction to the right
    contours = axes.contour(
        *found.coordinates, np.ma.masked_invalid(logarithms.T), levels, colors=INK, linewidths=0.7, linestyles="solid"
    )
    axes.clabel(contours, fmt=lambda level: f"{10**level:.2g}", fontsize=6)
    marks = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)] if found.directions == "between" else [(0.0, 0.0)]
    for number, point in enumerate(marks):
        axes.plot(*point, "Dos"[number], color=SERIES[0], ms=4)
    axes.set_xlabel(f"first {unit}")
    axes.set_ylabel(f"second {unit}")
    axes.set_title("mean loss", fontsize="medium")


def _read_numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)

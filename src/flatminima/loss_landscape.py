"""The loss along one or two directions from a minimum (Li et al. 2018, Visualizing the Loss Landscape of Neural Nets).

A picture to look at, not a measure: what it shows depends on the directions, and two dimensions of many hide saddles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from flatminima.errors import (
    FlatminimaError,
    NonFiniteError,
    needing,
    one_line,
    require,
    require_integer,
    require_one_of,
    require_positive,
)
from flatminima.files import write_file
from flatminima.losses import Loss
from flatminima.measures import DataSurface, evaluate, hessian_of, jsonable, top_eigenpairs
from flatminima.network import (
    Data,
    Samples,
    evaluating,
    moved,
    samples_of,
    true_precision,
    undisturbed,
    undone_if_interrupted,
)
from flatminima.parallel import is_sharded
from flatminima.progress import ProgressBar

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes

Directions = Literal["random", "hessian", "between"]

Direction = dict[str, Tensor]
"""What is added to parameters and buffers by name; others stay."""


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

    directions: Directions
    coordinates: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] = ()
    eigenvalues: tuple[float, ...] = ()

    def to_tensor(self) -> Tensor:
        """The losses in float64, with a dimension for each direction: (steps,) or (steps, steps)."""
        return torch.tensor(self.losses, dtype=torch.float64).reshape([len(axis) for axis in self.coordinates])

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """The loss as a curve, or as contours of equal ratios; the minimum and the others are marked (matplotlib).

        Args:
            ax: where to draw (None: a new figure of a column's width).

        Raises:
            FlatminimaError: without matplotlib, or if no loss is finite and positive.
        """
        require(any(loss > 0 for loss in self.losses), "no loss of this landscape is finite and positive")
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
            values = json.loads(text)
            return cls(
                values["directions"],
                tuple(tuple(axis) for axis in values["coordinates"]),
                _read_numbers(values["losses"]),
                _read_numbers(values["accuracies"]),
                tuple(values.get("eigenvalues", ())),  # which came later
            )
        except (ValueError, TypeError, KeyError) as error:
            raise FlatminimaError(f"not a landscape: {one_line(error)}") from None


def _draw(axes: Axes, found: Landscape) -> None:
    import numpy as np

    from flatminima.palette import INK, SERIES

    losses = found.to_tensor().numpy()
    unit = "way to the other" if found.directions == "between" else "direction"
    if len(found.coordinates) == 1:
        axes.plot(found.coordinates[0], losses, color=SERIES[0], lw=1)
        axes.set_xlabel(f"{unit}, the minimum is at 0")
        axes.set_ylabel("mean loss")
        for end in (0.0, 1.0) if found.directions == "between" else (0.0,):
            axes.axvline(end, color=INK, lw=0.5, ls=":")
        return
    logarithms = np.log10(np.where(losses > 0, losses, np.nan))
    levels = np.linspace(np.nanmin(logarithms), np.nanmax(logarithms), 12)
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


@undone_if_interrupted
def landscape(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    directions: Directions = "random",
    to: nn.Module | Mapping[str, Tensor] | Sequence[nn.Module | Mapping[str, Tensor]] = (),
    dimensions: Literal[1, 2] = 1,
    extent: float = 1.0,
    steps: int = 21,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = True,
) -> Landscape:
    """The mean loss over ``data`` on a grid of weights around those of ``model``, which is left as it was.

    Args:
        model: in eval mode, with BatchNorm's running statistics as they are.
        data: as for :func:`flatminima.measure`; a fixed part of the training set is enough for a picture.
        loss: as for :func:`flatminima.measure`.
        directions: ``"random"``: Gaussian, each filter (row of a weight: what feeds one output) scaled to the norm of
            the network's own, biases and normalizations left alone (Li et al. 2018, Sec. 4), so that networks whose
            layers have different scales can be compared. ``"hessian"``: along the eigenvectors of the Hessian of this
            mean loss with the largest eigenvalues, of all trainable parameters, at length 1 and not scaled by filters,
            since they would be eigenvectors no more (as Yao et al. 2020, PyHessian). ``"between"``: from the model
            towards one or two others, whose floating-point buffers (running statistics) are mixed as well (Goodfellow
            et al. 2015).
        to: the others for ``"between"``: models, or their ``state_dict``; two span a plane.
        dimensions: of ``"random"`` and ``"hessian"``: a line or a plane.
        extent: likewise: the grid reaches from -extent to extent. ``"between"`` always reaches from half a way
            behind the model to half a way past the other (from -0.5 to 1.5; the others are at 1).
        steps: grid points a direction; odd, and of ``"between"`` 5, 9, 13, ..., so that the minima are among them.
        seed: draws the random directions; the same ones for networks of the same shapes. Of ``"hessian"``, the vector
            that its Lanczos iterations begin with.
        path: a file that keeps what is done, so that an interrupted call goes on.
        progress: show a bar with the time left on a terminal.

    Raises:
        FlatminimaError: for arguments out of range, weights that do not fit the model's, sharded models, or a file that
            holds another landscape; without scipy for ``"hessian"``.
        UndefinedMeasureError: if the Hessian is not right, as PyTorch gives it, or the iterations do not converge.
        NonFiniteError: if the loss at the model's own weights is not finite.

    Example:
        >>> import torch, flatminima
        >>> inputs, targets = torch.randn(40, 5), torch.arange(40) % 3
        >>> found = flatminima.landscape(torch.nn.Linear(5, 3), (inputs, targets), steps=5)
        >>> found.coordinates
        ((-1.0, -0.5, 0.0, 0.5, 1.0),)
    """
    others = [to] if isinstance(to, (nn.Module, Mapping)) else list(to)
    require_one_of("directions", directions, ("random", "hessian", "between"))
    _require_others(directions, len(others))
    require(dimensions in (1, 2), f"dimensions must be 1 or 2, got {dimensions!r}")
    require_positive("extent", extent)
    require_integer("steps", steps)
    require(steps >= 3 and steps % 2 == 1, f"steps must be odd, 3 or more, got {steps}")
    require(
        directions != "between" or steps % 4 == 1,
        f"steps must be 5, 9, 13, 17, 21 ... for directions='between', so that both ends are grid points, got {steps}",
    )
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    require(not sharded, "a sharded model has no whole weights to move: load its checkpoint into one process")
    samples = samples_of(data)
    eigenvalues: tuple[float, ...] = ()
    with ProgressBar("preparing", None, enabled=progress):
        if directions == "random":
            chosen = [_random_direction(model, seed, number) for number in range(dimensions)]
            axes = [_grid(-extent, extent, steps)] * dimensions
        elif directions == "hessian":
            eigenvalues, chosen = _eigenvectors(model, samples, loss, dimensions, seed, progress)
            axes = [_grid(-extent, extent, steps)] * dimensions
        else:
            chosen = [_difference(model, other) for other in others]
            axes = [_grid(-0.5, 1.5, steps)] * len(others)
        found = Landscape(directions, tuple(axes), (), (), eigenvalues)
        return _evaluated(model, samples, loss, chosen, found, None if path is None else Path(path), progress)


def _require_others(directions: Directions, count: int) -> None:
    if directions == "between":
        require(count in (1, 2), f"directions='between' needs to=, one or two other models, got {count}")
    else:
        require(count == 0, f"to= has a meaning for directions='between' alone, not for {directions!r}")


def _grid(first: float, last: float, steps: int) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, steps, dtype=torch.float64).tolist())


def _random_direction(model: nn.Module, seed: int, number: int) -> Direction:
    """Gaussian, each filter of the norm of the network's own; one-dimensional parameters stay (Li et al., Sec. 4)."""
    generator = torch.Generator().manual_seed(seed + number)
    direction = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dim() > 1:
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).flatten(1)
            norms = weight.detach().double().cpu().flatten(1).norm(dim=1, keepdim=True)
            scaled = drawn * (norms / drawn.norm(dim=1, keepdim=True))
            direction[name] = scaled.view(weight.shape).to(weight)
    require(len(direction) > 0, "the model has no trainable weights of two or more dimensions to move")
    return direction


def _eigenvectors(
    model: nn.Module, samples: Samples, loss: Loss, count: int, seed: int, progress: bool
) -> tuple[tuple[float, ...], list[Direction]]:
    """The largest eigenvalues of the Hessian, and their eigenvectors, of length 1 (Yao et al. 2020, PyHessian)."""
    evaluate(model, samples, loss)  # refuses a network with NaN, and data that it does not take, as such
    surface = DataSurface(model, samples, loss, _SAMPLES_AT_ONCE)
    require(
        sum(weight.numel() for weight in surface.parameters.values()) >= count,
        f"the model has fewer trainable parameters than directions: dimensions={count}",
    )
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        for state in (undisturbed(model), evaluating(model), true_precision(), torch.enable_grad()):
            stack.enter_context(state)
        stack.enter_context(needing("curvature", "a landscape along the Hessian's eigenvectors"))
        bar = stack.enter_context(ProgressBar("Hessian products", None, enabled=progress))
        hessian = stack.enter_context(hessian_of(surface, generator))
        hessian.after_product = bar.advance
        values, vectors = top_eigenpairs(hessian, count, generator)
    sizes = [weight.numel() for weight in surface.parameters.values()]
    directions = [
        {
            name: part.view_as(weight).to(weight)
            for (name, weight), part in zip(surface.parameters.items(), torch.split(vector, sizes), strict=True)
        }
        for vector in vectors.unbind(1)
    ]
    return tuple(values.tolist()), directions


_SAMPLES_AT_ONCE = 300
"""Of which a Hessian product takes a third, as it goes back through two passes."""


def _difference(model: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> Direction:
    """From the model's weights, and floating-point buffers, to another's."""
    there = other.state_dict() if isinstance(other, nn.Module) else other
    own = model.state_dict()  # without buffers that are not saved, such as frequencies of rotary embeddings
    here = {name: tensor for name, tensor in _tensors(model).items() if name in own}
    missing = [name for name in here if name not in there or there[name].shape != here[name].shape]
    require(
        not missing, f"the other weights do not fit the model: {missing[0] if missing else ''} is missing or differs"
    )
    return {name: there[name].to(tensor) - tensor for name, tensor in here.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def _evaluated(
    model: nn.Module,
    samples: Samples,
    loss: Loss,
    directions: Sequence[Direction],
    grid: Landscape,
    path: Path | None,
    progress: bool,
) -> Landscape:
    """The grid with its losses; the minimum first, so that a network with NaN is refused at once."""
    center = evaluate(model, samples, loss)
    known = _Kept(path, _digest(model, directions, grid, center.loss))
    points = list(itertools.product(*grid.coordinates))
    here = _tensors(model)
    with ProgressBar("loss landscape", len(points), enabled=progress) as bar:
        for number, point in enumerate(points):
            if number >= len(known.losses):
                moves: Direction = {}
                for step, direction in zip(point, directions, strict=True):
                    for name, along in direction.items():
                        moves[name] = moves[name] + step * along if name in moves else step * along
                with moved([here[name] for name in moves], list(moves.values()), 1.0):
                    try:
                        found = evaluate(model, samples, loss)
                        known.add(found.loss, None if found.correct is None else found.accuracy)
                    except NonFiniteError:
                        known.add(math.nan, None if center.correct is None else math.nan)
            bar.advance()
    accuracies = () if center.correct is None else tuple(known.accuracies)
    return dataclasses.replace(grid, losses=tuple(known.losses), accuracies=accuracies)


class _Kept:
    """What is done of a landscape, in a file if there is to be one."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path, self._digest = path, digest
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        if path is not None and path.exists():
            self._read(path)

    def add(self, loss: float, accuracy: float | None) -> None:
        self.losses.append(loss)
        self.accuracies += [] if accuracy is None else [accuracy]
        if self._path is not None:
            values = {"digest": self._digest, "losses": self.losses, "accuracies": self.accuracies}
            write_file(self._path, json.dumps(jsonable(values), allow_nan=False))

    def _read(self, path: Path) -> None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            digest = values["digest"]
            self.losses, self.accuracies = (
                list(_read_numbers(values["losses"])),
                list(_read_numbers(values["accuracies"])),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FlatminimaError(f"{path} is no landscape that was begun: {one_line(error)}") from None
        require(
            digest == self._digest,
            f"{path} holds another landscape (other weights, data, loss, directions or grid): choose another path, or "
            "remove it",
        )


def _digest(model: nn.Module, directions: Sequence[Direction], grid: Landscape, center: float) -> str:
    """Of everything that decides the losses; the loss at the minimum stands for the data."""
    digest = hashlib.sha256(json.dumps([grid.coordinates, center]).encode())
    for named in (_tensors(model), *directions):
        for name, tensor in named.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)

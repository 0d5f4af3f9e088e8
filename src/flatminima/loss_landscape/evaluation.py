"""The loss on a grid of weights: what is asked for, its directions, and its points one by one."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flatminima.errors import (
    CoarseRoundingWarning,
    NonFiniteError,
    require,
    require_flag,
    require_integer,
    require_one_of,
    require_positive,
    require_seed,
    warn,
)
from flatminima.gramian import unwrapped
from flatminima.loss_landscape.directions import (
    Direction,
    OtherModel,
    eigenvectors,
    movable,
    random_directions,
    ways_to,
)
from flatminima.loss_landscape.fingerprint import fingerprint
from flatminima.loss_landscape.growing import GrowingLandscape
from flatminima.loss_landscape.landscape_file import LandscapeFile
from flatminima.loss_landscape.landscapes import DirectionKind, Landscape
from flatminima.losses import Loss
from flatminima.measures import Evaluation, evaluate, refuse_random
from flatminima.network import (
    Data,
    Samples,
    SamplesOfModel,
    call_model_without_graph,
    device_of,
    evaluating,
    moved,
    require_values,
    samples_of,
    to_device,
    true_precision,
    undisturbed,
    undone_if_interrupted,
)
from flatminima.parallel import is_sharded, without_exchanges
from flatminima.progress import ProgressBar

MOST_POINTS = 1_000_000
"""Of a grid; every one is a pass over the data."""

_SAMPLES_REPEATED = 16
"""How many go through the network twice, to see that it is not random."""


@undone_if_interrupted
def landscape(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    directions: DirectionKind = "random",
    to: OtherModel | Sequence[OtherModel] = (),
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
        path: a file that keeps what is done, so that an interrupted call goes on; when all is done,
            :meth:`Landscape.from_json` reads it. The eigenvectors lie beside it, in ``path.directions``. One call at a
            time: two processes with one path would overwrite each other's points. A call goes on with the same grid,
            weights, loss and data, all of which are looked at in a further pass over the data. A function that is the
            loss is known by the names, constants and enclosed values of its code; what else it computes, and the
            model's code, by the mean loss at the minimum alone, to 1e-4 of it.
        progress: show a bar with the time left on a terminal.

    Raises:
        FlatminimaError: for arguments out of range, weights that do not fit the model's or are the same, sharded
            models, networks that are random in eval mode, or a file that holds another landscape or cannot be written;
            without scipy for ``"hessian"``.
        UndefinedMeasureError: if the Hessian is not right, as PyTorch gives it, or the iterations do not converge.
        NonFiniteError: if the loss at the model's own weights is not finite.

    Warns:
        CoarseRoundingWarning: if the weights are in half precision.

    Example:
        >>> import torch, flatminima
        >>> inputs, targets = torch.randn(40, 5), torch.arange(40) % 3
        >>> found = flatminima.landscape(torch.nn.Linear(5, 3), (inputs, targets), steps=5)
        >>> found.coordinates
        ((-1.0, -0.5, 0.0, 0.5, 1.0),)
    """
    others = _others(to)
    require_one_of("directions", directions, get_args(DirectionKind))
    _require_arguments(directions, len(others), dimensions, extent, steps)
    require_seed(seed)
    require_flag("progress", progress)
    steps, seed = int(steps), int(seed)  # numpy's are integers, too
    _require_path(path)
    model = without_exchanges(model)
    _require_movable(model)
    inner = unwrapped(model)  # by whose names checkpoints and other models call the weights
    models = [inner, *(unwrapped(other) for other in others if isinstance(other, nn.Module))]
    with undisturbed(*models):  # whose weights no other thread may see on the way
        samples = SamplesOfModel(inner, samples_of(data))
        axis = [_coordinate(number, steps, directions, extent) for number in range(steps)]
        grid = Landscape(directions, (tuple(axis),) * (len(others) or dimensions), ())
        with ProgressBar("preparing", None, enabled=progress):
            center = evaluate(model, samples, loss)  # first, so that a network with NaN is refused at once
            _refuse_random(model, samples)
            ways = ways_to(inner, others) if directions == "between" else []
            here, file = movable(inner), None
            if path is not None:
                known = fingerprint([grid.coordinates, directions, seed], loss, [here, *ways], samples)
                file = LandscapeFile(Path(path), known, center.loss)
            growing = GrowingLandscape(grid, file)
            if growing.eigenvectors is not None:
                ways = [{name: along.to(here[name]) for name, along in way.items()} for way in growing.eigenvectors]
            elif directions == "random":
                ways = random_directions(inner, seed, dimensions)
            elif directions == "hessian" and not growing.is_whole:
                eigenvalues, ways = eigenvectors(inner, samples, loss, dimensions, seed, progress)
                growing.set_eigenvectors(eigenvalues, ways)
        with growing.saved_at_the_end():
            _evaluate_points(model, samples, loss, here, ways, center, growing, progress)
        return growing.landscape


def _others(to: Any) -> list[OtherModel]:
    listed = [to] if isinstance(to, (nn.Module, Mapping)) else to
    several = isinstance(listed, Iterable) and not isinstance(listed, (str, Tensor))
    found = list(listed) if several else [to]
    wrong = [type(other).__name__ for other in found if not isinstance(other, (nn.Module, Mapping))]
    require(not wrong, f"to must be models or their state_dicts, got {next(iter(wrong), '')}: load the weights first")
    return found


def _require_arguments(directions: DirectionKind, others: int, dimensions: int, extent: float, steps: int) -> None:
    between = directions == "between"
    if between:
        require(others in (1, 2), f"directions='between' needs to=, one or two other models, got {others}")
    else:
        require(others == 0, f"to= has a meaning for directions='between' alone, not for {directions!r}")
    require_integer("dimensions", dimensions)
    require(dimensions in (1, 2), f"dimensions must be 1 or 2, got {dimensions!r}")
    require(not between or dimensions <= others, "directions='between' has a plane through two other models: to=[a, b]")
    require_positive("extent", extent)
    require(
        not between or extent == 1,
        f"extent has no meaning for directions='between', which reaches from -0.5 to 1.5: leave it out, got {extent}",
    )
    require_integer("steps", steps)
    require(steps >= 3 and steps % 2 == 1, f"steps must be odd, 3 or more, got {steps}")
    require(
        not between or steps % 4 == 1,
        f"steps must be 5, 9, 13, 17, 21 ... for directions='between', so that both ends are grid points, got {steps}",
    )
    points = steps ** (others or dimensions)
    require(
        points <= MOST_POINTS,
        f"a grid of {points:,} points is a pass over the data for each: lower steps (at most {MOST_POINTS:,} points)",
    )


def _require_path(path: Any) -> None:
    is_path = path is None or isinstance(path, (str, os.PathLike))
    require(is_path and path != "", f"path must name a file, got {path!r}")


def _require_movable(model: nn.Module) -> None:
    require_values(model)
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    require(not sharded, "a sharded model has no whole weights to move: load its checkpoint into one process")
    for name, parameter in model.named_parameters():
        require(not parameter.is_complex(), f"parameter {name} is {parameter.dtype}: complex weights are not moved")
        if parameter.is_floating_point() and parameter.element_size() < 4:
            lost = torch.finfo(parameter.dtype).eps
            warn(
                f"parameter {name} is {parameter.dtype}, in which moves of less than {lost:g} of a weight are lost to "
                "rounding: for a smooth landscape pass copy.deepcopy(model).float()",
                CoarseRoundingWarning,
            )
            return


def _coordinate(number: int, steps: int, directions: DirectionKind, extent: float) -> float:
    """That of a grid point, in order; exact where the minima are."""
    passed = 2 * number / (steps - 1)
    return passed - 0.5 if directions == "between" else (passed - 1) * float(extent)


def _refuse_random(model: nn.Module, samples: Samples) -> None:
    """Refuse a network whose landscape would be noise."""
    batch = samples.fetch(range(min(_SAMPLES_REPEATED, len(samples))))
    inputs, _ = to_device(batch, device_of(model))
    with evaluating(model), true_precision():
        refuse_random(*(call_model_without_graph(model, inputs) for _ in range(2)))


def _evaluate_points(
    model: nn.Module,
    samples: Samples,
    loss: Loss,
    here: Mapping[str, Tensor],
    ways: Sequence[Direction],
    center: Evaluation,
    growing: GrowingLandscape,
    progress: bool,
) -> None:
    """Add every grid point that is not done, the last direction's coordinate varying fastest."""
    classifies = center.correct is not None
    points = itertools.product(*growing.grid.coordinates)
    with ProgressBar("loss landscape", growing.grid.points, enabled=progress) as bar:
        for number, point in enumerate(points):
            if number >= len(growing.losses):
                moves = _moves(point, ways)
                with moved([here[name] for name in moves], list(moves.values()), 1.0):
                    try:
                        found = evaluate(model, samples, loss) if any(point) else center
                        growing.add(found.loss, found.accuracy if classifies else None)
                    except NonFiniteError:
                        growing.add(math.nan, math.nan if classifies else None)
            bar.advance()


def _moves(point: Sequence[float], ways: Sequence[Direction]) -> Direction:
    moves: Direction = {}
    for step, way in zip(point, ways, strict=True):
        for name, along in way.items():
            moves[name] = moves[name] + step * along if name in moves else step * along
    return moves

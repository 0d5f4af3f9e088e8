"""The measures of a network while it trains: the same subsets every time, within a share of the time."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from flatminima.errors import (
    FlatminimaError,
    NonFiniteError,
    NotAMinimumWarning,
    RankDeficientError,
    UntrackedEpochWarning,
    did_you_mean,
    needing,
    one_line,
    require,
    require_integer,
    require_number,
    warn,
)
from flatminima.files import require_writable, write_file
from flatminima.losses import brief_forms, form_in_words
from flatminima.measures import Characterization, MeasureOptions, PlainOptions, measure, selected
from flatminima.network import Data, add_state, without_autocast
from flatminima.parallel import Processes

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes


PARTS = ("log_det_fisher", "residual", "sensitivity", "diversity")
"""γ̂ and what it is made of."""

EPOCHS_ROWS = 5
"""How high a picture of epochs is, in rows of names."""

LOGGED_AS = "flatminima/"
"""What trainers' logs have before the measures' names."""


@dataclass(frozen=True)
class TrackedEpoch:
    """What was measured at the end of an epoch.

    Attributes:
        epoch: counted from 1; 0 is before training.
        seconds: that measuring took.
        measures: as :meth:`flatminima.Characterization.to_metrics` names them.
        others: numbers that the caller added, such as a validation error.
        options: those that decide the measures, as JSON has them; None where an earlier version tracked.
    """

    epoch: int
    seconds: float
    measures: dict[str, float]
    others: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] | None = None

    def logged(self) -> dict[str, float]:
        """The measures under the names that trainers log them by."""
        return {f"{LOGGED_AS}{name}": value for name, value in self.measures.items()}


class Tracker:
    """Measures a network at the end of epochs: a line in a training loop.

    Every measurement takes the same subsets, so that epochs can be compared. A network that still trains is no minimum:
    :class:`~flatminima.errors.NotAMinimumWarning` is not given, and the training loss stands beside the measures. Where
    a network cannot be measured (NaN, a singular ξ) the epoch is left out with a warning, and training goes on.

    Args:
        data: as for :func:`flatminima.measure`: the un-augmented training set.
        options: how to measure; by default 10 trials.
        every: measure after every so many epochs.
        time_share: measure only as long as all measuring takes at most this share of the time since the tracker was
            made, judged by what the last measurement took; epochs that would cost more are left out. The first due
            epoch is always measured. None: no limit.
        path: a file that holds every epoch as a line of JSON, so that nothing is lost. If it exists the tracker goes on
            from it: an epoch that is measured again takes the place of the former. Epochs that were measured with
            other options are refused.

    Attributes:
        epochs: a :class:`TrackedEpoch` for every epoch that was measured, in order.
        left_out: the epochs that were due and not measured, to keep to ``time_share``.

    Raises:
        FlatminimaError: for arguments out of range, or a file that no tracker wrote, that one with other options wrote,
            or that cannot be written.

    Example:
        >>> import torch, flatminima
        >>> inputs, targets = torch.randn(60, 5), torch.arange(60) % 3
        >>> model = torch.nn.Linear(5, 3)
        >>> tracker = flatminima.Tracker((inputs, targets), flatminima.MeasureOptions(trials=2, subset_size=10))
        >>> metrics = tracker(model, epoch=1, validation_error=0.5)
        >>> metrics["validation_error"], "sensitivity" in metrics, len(tracker.epochs)
        (0.5, True, 1)
    """

    def __init__(
        self,
        data: Data,
        options: MeasureOptions | None = None,
        *,
        every: int = 1,
        time_share: float | None = None,
        path: str | Path | None = None,
    ) -> None:
        require_integer("every", every)
        require(every >= 1, f"every must be at least 1, got {every}")
        if time_share is not None:
            require_number("time_share", time_share)
            require(0 < time_share < 1, f"time_share must lie between 0 and 1, got {time_share}")
        require(
            options is None or isinstance(options, MeasureOptions),
            f"options must be MeasureOptions, got {type(options).__name__}: pass flatminima.MeasureOptions(...)",
        )
        self._data = data
        self._options = MeasureOptions(trials=10) if options is None else options
        self._every, self._time_share = every, time_share
        self._path = None if path is None else Path(path)
        if self._path is not None and Processes.launched().rank == 0:  # which alone writes it
            require_writable(self._path)  # now, not when the first epoch has been trained
        self._deciding = _deciding(self._options)
        self.epochs = read_epochs(self._path) if self._path is not None and self._path.exists() else []
        for tracked in self.epochs:
            _require_same_options(tracked, self._deciding, self._path)
        self.left_out: list[int] = []
        self._start, self._measuring, self._last = perf_counter(), 0.0, 0.0

    def __call__(self, model: nn.Module, epoch: int, **others: float) -> dict[str, float] | None:
        """Measure ``model`` at the end of ``epoch`` if it is due and the time allows; the model is left as it was.

        Of several processes (DDP, FSDP2) all call, and the first one's clock decides for all. Autocast that a trainer
        has put around the model is off while it is measured.

        Args:
            model: as for :func:`flatminima.measure`.
            epoch: how many have been trained.
            **others: numbers to keep beside the measures, such as a validation error; None, and what is not finite, is
                left out.

        Returns:
            The measures with ``others``, for any logger, or None if nothing was measured. A measure's name is the
            measure's: an equal one among ``others`` stands in :attr:`epochs` alone.

        Raises:
            FlatminimaError: for data, options or a model that :func:`flatminima.measure` refuses.

        Warns:
            UntrackedEpochWarning: if the network as it is now cannot be measured.
        """
        tracked = self.track(model, epoch, others)
        return None if tracked is None else tracked.others | tracked.measures

    def track(self, model: nn.Module, epoch: int, others: Mapping[str, float] | None = None) -> TrackedEpoch | None:
        """As the call, with ``others`` of any names; the epoch as it is kept."""
        require_integer("epoch", epoch)
        epoch = int(epoch)  # numpy's integers are none to JSON
        if epoch % self._every:
            return None
        processes = Processes.all() if dist.is_available() and dist.is_initialized() else Processes()
        if not processes.first(self._affordable):
            self.left_out.append(epoch)
            return None
        kept = _finite(others or {})
        before = perf_counter()
        try:
            found = self._measured(model, processes)
        except (NonFiniteError, RankDeficientError) as error:
            warn(f"epoch {epoch} is not tracked: {error}", UntrackedEpochWarning)
            return None
        finally:
            self._last = perf_counter() - before
            self._measuring += self._last
        tracked = TrackedEpoch(epoch, self._last, found.to_metrics(), kept, self._deciding)
        self.epochs = _by_epoch([*self.epochs, tracked])
        if self._path is not None:
            processes.first(partial(write_file, self._path, _lines_of(self.epochs)))
        return tracked

    def rehearsal(self) -> Tracker:
        """A tracker that measures as this one does, but whose epochs are not kept, here or in the file."""
        twin = copy.copy(self)
        twin._path, twin.left_out = None, []
        return twin

    def plot(self, measures: Sequence[str] = PARTS, *, ax: Axes | None = None) -> Axes:
        """Measures over epochs, on the left; on the right the training error, and what else is an error (matplotlib).

        Args:
            measures: names, of the same unit; by default γ̂ and its parts.
            ax: where to draw (None: a new figure of a column's width).

        Raises:
            FlatminimaError: if nothing was measured yet, for a name that was not, or without matplotlib.
        """
        measures = tuple(measures)  # a generator would be empty after this
        require(len(self.epochs) > 0, "nothing was measured yet: call the tracker at the end of epochs")
        known = self.epochs[0].measures
        for name in measures:
            require(name in known, f"unknown measure {name!r}{did_you_mean(name, known)}: it was not tracked")
        with needing("plot", "a picture"):
            from flatminima.pictures import drawn
        return drawn(lambda axes: draw_epochs(axes, self.epochs, measures), EPOCHS_ROWS, ax)

    def _affordable(self) -> bool:
        if self._time_share is None or not self._measuring:
            return True
        return self._measuring + self._last <= self._time_share * (perf_counter() - self._start)

    def _measured(self, model: nn.Module, processes: Processes) -> Characterization:
        options = {f.name: getattr(self._options, f.name) for f in dataclasses.fields(self._options)}
        options["progress"] = self._options.progress and processes.rank == 0
        with without_autocast(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotAMinimumWarning)
            return measure(model, self._data, **options)


def draw_epochs(
    axes: Axes, epochs: Sequence[TrackedEpoch], measures: Sequence[str] = PARTS, unit: str = "epoch"
) -> None:
    """The picture of :meth:`Tracker.plot`, of numbers that count something else than epochs, too."""
    from flatminima.pictures import legend, series_styles

    styles = series_styles()
    numbers = [tracked.epoch for tracked in epochs]

    def line(on: Axes, name: str, values: list[float]) -> None:
        style = next(styles)
        on.plot(numbers, values, style["line"], color=style["colour"], marker=style["marker"], ms=3, lw=1)
        axes.plot([], [], style["line"], color=style["colour"], marker=style["marker"], ms=3, lw=1, label=name)

    for name in measures:
        line(axes, name, [tracked.measures.get(name, math.nan) for tracked in epochs])
    axes.set_xlabel(unit)
    errors = dict.fromkeys(name for tracked in epochs for name in tracked.others if name.endswith("error"))
    if errors or "train_accuracy" in epochs[0].measures:
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.set_ylabel("error (%)")
        right.set_ylim(bottom=0)
        if "train_accuracy" in epochs[0].measures:
            line(right, "training error", [100 * (1 - tracked.measures["train_accuracy"]) for tracked in epochs])
        for name in errors:
            line(right, name, [100 * tracked.others.get(name, math.nan) for tracked in epochs])
        right.autoscale(axis="y")
        right.set_ylim(bottom=0)
    legend(axes)


def read_epochs(path: str | Path) -> list[TrackedEpoch]:
    """What a tracker wrote, in the order of epochs.

    Raises:
        FlatminimaError: if the file is missing or no tracker wrote it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return _by_epoch([TrackedEpoch(**json.loads(line)) for line in lines])
    except (OSError, ValueError, TypeError) as error:
        raise FlatminimaError(f"{path} is not what a tracker wrote: {one_line(error)}") from None


def _lines_of(epochs: Sequence[TrackedEpoch]) -> str:
    return "".join(f"{json.dumps(dataclasses.asdict(tracked))}\n" for tracked in epochs)


def _deciding(options: MeasureOptions) -> dict[str, Any]:
    """What must be equal for epochs to be compared."""
    named = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(PlainOptions)}
    named |= {
        "loss": form_in_words(options.loss),
        "measures": [measure.name for measure in selected(options.measures).measures],
        "initial": None if options.initial is None else _digest(options.initial),
    }
    return dict(json.loads(json.dumps(named)))  # as it is read


def _digest(weights: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    add_state(digest, weights)
    return digest.hexdigest()[:16]


def _require_same_options(tracked: TrackedEpoch, deciding: dict[str, Any], path: Path | None) -> None:
    for name, value in (tracked.options or {}).items():
        present = deciding.get(name)
        written, asked = brief_forms(value, str(present)) if name == "loss" and value != present else (value, present)
        require(
            value == present,
            f"{path} was written with {name}={written!r}, and this tracker has {name}={asked!r}: the epochs would not "
            "compare; name another file, or measure with the options of this one",
        )


def _finite(others: Mapping[str, float | None]) -> dict[str, float]:
    """Those that there are, as floats."""
    found = {}
    for name, value in others.items():
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise FlatminimaError(f"{name} must be a number, or None where there is none, got {value!r}") from None
        if math.isfinite(number):
            found[name] = number
    return found


def _by_epoch(epochs: list[TrackedEpoch]) -> list[TrackedEpoch]:
    """In their order; of an epoch that is there twice, the later."""
    found = {tracked.epoch: tracked for tracked in epochs}
    return [found[epoch] for epoch in sorted(found)]

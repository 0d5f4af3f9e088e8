"""A landscape as it grows, point by point, and when it is written to its file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flatminima.loss_landscape.directions import Direction
from flatminima.loss_landscape.landscape_file import LandscapeFile
from flatminima.loss_landscape.landscapes import Landscape

_SECONDS = 1.0
"""Between two times that the file is written: what a killed process may lose."""


class GrowingLandscape:
    """A landscape of which some points are done: those that its file holds, and those that are added.

    Args:
        grid: without losses.
        file: where it is kept; None for nowhere.

    Attributes:
        grid: without losses, but with the eigenvalues once they are known.
        losses: of the points that are done, in order.
        accuracies: likewise; empty where nothing is classified.
        eigenvectors: where they are known and still needed; those of the file are on the CPU.

    Raises:
        FlatminimaError: if the file holds something else, is damaged, or cannot be written.
    """

    def __init__(self, grid: Landscape, file: LandscapeFile | None) -> None:
        self.grid = grid
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.eigenvectors: list[Direction] | None = None
        self._file = file
        self._is_saved, self._saved_at = True, time.monotonic()
        found = None if file is None else file.read()
        if found is not None:
            self.grid = dataclasses.replace(grid, eigenvalues=found.eigenvalues)
            self.losses, self.accuracies = list(found.losses), list(found.accuracies)
        if file is not None and not self.is_whole:
            file.require_writable()
            self.eigenvectors = file.read_eigenvectors()

    @property
    def is_whole(self) -> bool:
        """Whether every point is done."""
        return len(self.losses) == self.grid.points

    @property
    def landscape(self) -> Landscape:
        """With what is done."""
        return dataclasses.replace(self.grid, losses=tuple(self.losses), accuracies=tuple(self.accuracies))

    def set_eigenvectors(self, eigenvalues: tuple[float, ...], eigenvectors: list[Direction]) -> None:
        """Written at once, as another call might find others: in the last bits, or with another sign."""
        self.grid, self.eigenvectors = dataclasses.replace(self.grid, eigenvalues=eigenvalues), eigenvectors
        if self._file is not None:
            self._file.write_eigenvectors(eigenvectors)
            self._save(self._file)

    def add(self, loss: float, accuracy: float | None) -> None:
        """The next point."""
        self.losses.append(loss)
        self.accuracies += [] if accuracy is None else [accuracy]
        self._is_saved = False
        if self._file is not None and time.monotonic() - self._saved_at > _SECONDS:
            self._save(self._file)

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """What is added within is in the file afterwards, also if it ends early."""
        try:
            yield
        finally:
            if self._file is not None and not self._is_saved:
                self._save(self._file)

    def _save(self, file: LandscapeFile) -> None:
        file.write(self.landscape)
        self._is_saved, self._saved_at = True, time.monotonic()

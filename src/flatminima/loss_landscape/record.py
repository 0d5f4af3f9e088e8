"""What is done of a landscape, in a file if there is to be one, so that an interrupted call goes on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, one_line, require
from flatminima.files import require_writable, write_file
from flatminima.loss_landscape.directions import Direction
from flatminima.loss_landscape.landscapes import Landscape
from flatminima.measures import jsonable
from flatminima.network import Samples, tensors_of

_SECONDS = 1.0
"""Between two times that the file is written: what a killed process may lose."""

_SAMPLES_KNOWN = 16
"""How many first samples tell one data set from another, beside the loss at the minimum."""

_SAME_CENTER = 1e-3
"""How far that loss may be from what it was, relatively: other devices and numbers of threads round otherwise."""


def question(asked: Any, weights: Iterable[Mapping[str, Tensor]], samples: Samples) -> str:
    """A digest of what decides the losses: the arguments, the weights, and the first of the data."""
    digest = hashlib.sha256(json.dumps([asked, len(samples)]).encode())
    for named in weights:
        for name, tensor in named.items():
            digest.update(name.encode())
            digest.update(_bytes_of(tensor))
    for tensor in tensors_of(samples.fetch(range(min(_SAMPLES_KNOWN, len(samples))))):
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    held = tensor.detach().cpu().contiguous()
    return ctypes.string_at(held.data_ptr(), held.nbytes) if held.numel() else b""  # without numpy, if there is none


class Record:
    """A landscape as it grows.

    Args:
        path: of the file; None for no file.
        asked: what :func:`question` gives.
        grid: without losses.
        center: the loss at the minimum.

    Attributes:
        grid: without losses, but with the eigenvalues once they are known.
        losses: of the points that are done, in order.
        accuracies: likewise; empty where nothing is classified.
        directions: the eigenvectors, where they are known.

    Raises:
        FlatminimaError: if the file holds something else, is damaged, or cannot be written.
    """

    def __init__(self, path: Path | None, asked: str, grid: Landscape, center: float) -> None:
        self.grid = grid
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.directions: list[Direction] | None = None
        self._path, self._asked, self._center, self._of_directions = path, asked, center, ""
        self._is_written, self._written_at = True, time.monotonic()
        if path is not None:
            self._read(path)
            if not self.is_whole:
                require_writable(path)

    @property
    def is_whole(self) -> bool:
        """Whether every point is done."""
        return len(self.losses) == self.grid.points

    @property
    def landscape(self) -> Landscape:
        """With what is done."""
        return dataclasses.replace(self.grid, losses=tuple(self.losses), accuracies=tuple(self.accuracies))

    def keep_directions(self, eigenvalues: tuple[float, ...], directions: list[Direction]) -> None:
        """Eigenvectors, which another call might find otherwise: in the last bits, or with another sign."""
        self.grid, self.directions = dataclasses.replace(self.grid, eigenvalues=eigenvalues), directions
        if self._path is not None:
            content = BytesIO()
            torch.save([{name: along.cpu() for name, along in way.items()} for way in directions], content)
            write_file(_file_of_directions(self._path), content.getvalue())
            self._of_directions = hashlib.sha256(content.getvalue()).hexdigest()
            self._write(self._path)

    def add(self, loss: float, accuracy: float | None) -> None:
        """The next point."""
        self.losses.append(loss)
        self.accuracies += [] if accuracy is None else [accuracy]
        self._is_written = False
        if self._path is not None and time.monotonic() - self._written_at > _SECONDS:
            self._write(self._path)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is added within is in the file afterwards, also if it ends early."""
        try:
            yield
        finally:
            if self._path is not None and not self._is_written:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        about = {"question": self._asked, "center": self._center, "eigenvectors": self._of_directions}
        values = dataclasses.asdict(self.landscape) | about
        write_file(path, json.dumps(jsonable(values), allow_nan=False))
        self._is_written, self._written_at = True, time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = Landscape.from_values(values)
            asked, center, self._of_directions = values["question"], float(values["center"]), values["eigenvectors"]
        except FileNotFoundError:
            return
        except OSError as error:
            raise FlatminimaError(f"cannot keep a landscape in {path}: {error.strerror}; name another file") from None
        except KeyError as error:
            raise FlatminimaError(_NO_LANDSCAPE.format(path, f"it lacks {error}")) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise FlatminimaError(_NO_LANDSCAPE.format(path, one_line(error))) from None
        require(
            asked == self._asked and math.isclose(center, self._center, rel_tol=_SAME_CENTER),
            f"{path} holds another landscape (other weights, data, loss, directions or grid): choose another path, or "
            "remove it",
        )
        self.losses, self.accuracies = list(found.losses), list(found.accuracies)
        self.grid = dataclasses.replace(self.grid, eigenvalues=found.eigenvalues)
        if self._of_directions and not self.is_whole:
            self.directions = self._read_directions(path)

    def _read_directions(self, path: Path) -> list[Direction]:
        beside = _file_of_directions(path)
        with contextlib.suppress(OSError):
            content = beside.read_bytes()
            if hashlib.sha256(content).hexdigest() == self._of_directions:
                found: list[Direction] = torch.load(BytesIO(content), weights_only=True)
                return found
        raise FlatminimaError(
            f"{beside}, the eigenvectors of {path}, is missing or damaged: restore it, or remove {path} to begin anew"
        )


_NO_LANDSCAPE = "{} is no landscape that was begun: {}; choose another path, or remove it"


def _file_of_directions(path: Path) -> Path:
    return path.with_name(f"{path.name}.directions")

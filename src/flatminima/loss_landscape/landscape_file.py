"""The file that keeps what is done of a landscape, so that an interrupted call goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from io import BytesIO
from pathlib import Path

import torch

from flatminima.errors import FlatminimaError, require
from flatminima.files import require_writable, write_file
from flatminima.loss_landscape.directions import Direction
from flatminima.loss_landscape.landscapes import Landscape, landscape_from, what_is_wrong
from flatminima.measures import jsonable

_SAME_LOSS = 1e-4
"""How far the loss at the minimum may be from what it was, relatively: other devices and numbers of threads round
otherwise. What it tells apart is code; all else is in the fingerprint."""

_KEY_OF_0_2_0 = "digest"
"""What flatminima 0.2.0 called its own, of less than the fingerprint, in files that lack the grid."""

_REMEDY = "choose another path, or remove it"


class LandscapeFile:
    """JSON, which holds the fingerprint and the loss at the minimum beside what is done; eigenvectors lie beside it.

    Args:
        path: of the file.
        fingerprint: what tells this landscape from others.
        minimum: the loss there.
    """

    def __init__(self, path: Path, fingerprint: str, minimum: float) -> None:
        self._path, self._fingerprint, self._minimum = path, fingerprint, minimum
        self._beside = path.with_name(f"{path.name}.directions")
        self._eigenvectors_digest = ""

    def require_writable(self) -> None:
        """Raise :class:`FlatminimaError` unless it can be written."""
        require_writable(self._path)

    def write(self, landscape: Landscape) -> None:
        """Write what is done.

        Raises:
            FlatminimaError: if the file cannot be written.
        """
        about = {
            "fingerprint": self._fingerprint,
            "loss_at_minimum": self._minimum,
            "eigenvectors_digest": self._eigenvectors_digest,
        }
        write_file(self._path, json.dumps(jsonable(dataclasses.asdict(landscape) | about), allow_nan=False))

    def read(self) -> Landscape | None:
        """What is done; None where there is no file.

        Raises:
            FlatminimaError: if the file holds something else, or cannot be read.
        """
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            found = landscape_from(values)
            known, minimum = values["fingerprint"], float(values["loss_at_minimum"])
            self._eigenvectors_digest = values["eigenvectors_digest"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FlatminimaError(
                f"cannot keep a landscape in {self._path}: {error.strerror}; name another file"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"is no landscape that was begun: {what_is_wrong(error)}"
            if isinstance(error, KeyError) and _KEY_OF_0_2_0 in values:
                what = "was begun by flatminima 0.2.0, which goes on with it"
            raise FlatminimaError(f"{self._path} {what}; {_REMEDY}") from None
        require(
            known == self._fingerprint and math.isclose(minimum, self._minimum, rel_tol=_SAME_LOSS),
            f"{self._path} holds another landscape (other weights, data, loss, directions or grid): {_REMEDY}",
        )
        return found

    def write_eigenvectors(self, eigenvectors: list[Direction]) -> None:
        """Write them to their file; :meth:`write` then says which ones they are.

        Raises:
            FlatminimaError: if the file cannot be written.
        """
        content = BytesIO()
        torch.save([{name: along.cpu() for name, along in way.items()} for way in eigenvectors], content)
        write_file(self._beside, content.getvalue())
        self._eigenvectors_digest = hashlib.sha256(content.getvalue()).hexdigest()

    def read_eigenvectors(self) -> list[Direction] | None:
        """Those of the file that was read, on the CPU; None where it has none.

        Raises:
            FlatminimaError: if they are missing or damaged.
        """
        if not self._eigenvectors_digest:
            return None
        with contextlib.suppress(OSError):
            content = self._beside.read_bytes()
            if hashlib.sha256(content).hexdigest() == self._eigenvectors_digest:
                found: list[Direction] = torch.load(BytesIO(content), weights_only=True)
                return found
        raise FlatminimaError(
            f"{self._beside}, the eigenvectors of {self._path}, is missing or damaged: restore it, or remove "
            f"{self._path} to begin anew"
        )

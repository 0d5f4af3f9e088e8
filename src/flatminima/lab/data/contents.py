"""Digests of whole data, which say whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.pictures import Pictures
from flatminima.lab.data.ready import OwnData
from flatminima.lab.data.texts import Texts
from flatminima.lab.storage import bytes_of, digest_of
from flatminima.network import index_batches, tensors_of

_AT_ONCE = 100  # samples


def digest_of_data(data: OwnData) -> str:
    """Of every input and label, as they lie there: pictures are read and not decoded."""
    if isinstance(data, ImageSet):
        return digest_of(bytes_of(data.images), bytes_of(data.labels))
    return digest_of(str(len(data)).encode(), *(part.encode() for part in _digests(data)))


def _digests(data: OwnData) -> Iterator[str]:
    """Some samples' at a time."""
    if isinstance(data, (Pictures, Texts)) and data.labels is not None:
        yield digest_of(bytes_of(data.labels))
    for some in index_batches(len(data), _AT_ONCE):
        if isinstance(data, Pictures):
            yield from (digest_of(_bytes(each)) for each in data.encoded(some))
        elif isinstance(data, Texts):
            yield digest_of(repr(data.at(some)).encode())
        else:
            inputs, targets = data.fetch(some)
            yield digest_of(*(bytes_of(tensor) for tensor in (*tensors_of(inputs), targets)))


def _bytes(encoded: bytes | Path | Image.Image) -> bytes:
    if isinstance(encoded, Image.Image):
        return f"{encoded.mode} {encoded.size}".encode() + encoded.tobytes()
    return encoded.read_bytes() if isinstance(encoded, Path) else encoded

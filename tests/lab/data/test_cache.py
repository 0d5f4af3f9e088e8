from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima.errors import FlatminimaError
from flatminima.lab.data import sources
from flatminima.lab.data.cache import default_cache_dir, read_cache
from flatminima.lab.data.sources import load_data
from support.images import TEST_SHARD, Folder, assert_holds, encode_all, make_folder, write_shard
from support.messages import one_line

pytest_plugins = ("support.image_fixtures",)


@pytest.fixture
def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("decoded although the cache is there")

        monkeypatch.setattr(sources, "decode", refuse)

    return forbid


def test_decoded_once(folder: Folder, cache: Path, forbid_decoding: Callable[[], None]) -> None:
    first = load_data(str(folder.path), cache_dir=cache)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    forbid_decoding()
    second = load_data(str(folder.path), cache_dir=cache)
    assert_holds(folder, second)
    assert torch.equal(first[0].mean, second[0].mean)
    assert second[0].num_classes == 3


def test_changed_files_are_decoded_again(folder: Folder, cache: Path) -> None:
    load_data(str(folder.path), cache_dir=cache)
    folder.test_labels = [1, 2, 0, 0]
    shard = folder.path / TEST_SHARD
    before = shard.stat()
    write_shard(shard, encode_all(folder.test_images), folder.test_labels)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert shard.stat().st_size == before.st_size
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_files_of_another_size_are_decoded_again(folder: Folder, cache: Path) -> None:
    load_data(str(folder.path), cache_dir=cache)
    folder.test_images, folder.test_labels = folder.test_images[:3], folder.test_labels[:3]
    shard = folder.path / TEST_SHARD
    before = shard.stat()
    write_shard(shard, encode_all(folder.test_images), folder.test_labels)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_folders_of_one_name_do_not_share_a_cache(tmp_path: Path, cache: Path) -> None:
    one, other = make_folder(tmp_path / "a" / "x"), make_folder(tmp_path / "b" / "x")
    other.test_labels = [1, 2, 0, 0]
    write_shard(other.path / TEST_SHARD, encode_all(other.test_images), other.test_labels)
    for file in [*one.path.iterdir(), *other.path.iterdir()]:
        os.utime(file, ns=(0, 0))
    assert [(one.path / file.name).stat().st_size == file.stat().st_size for file in other.path.iterdir()] == [True] * 3
    assert_holds(one, load_data(str(one.path), cache_dir=cache))
    assert_holds(other, load_data(str(other.path), cache_dir=cache))


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"nonsense" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        flip_last_bit,
        lambda content: content.replace(b'"num_classes":"3"', b'"num_classes":"x"'),
        lambda content: content.replace(b'"checksum"', b'"checksux"'),
        lambda content: content.replace(b'"test_labels"', b'"text_labels"'),
    ],
    ids=["empty", "garbage", "truncated", "longer", "bit", "metadata", "no-checksum", "renamed"],
)
def test_damaged_cache_is_rebuilt(folder: Folder, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    load_data(str(folder.path), cache_dir=cache)
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    assert file.read_bytes() != intact
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))
    assert list(cache.iterdir()) == [file]
    assert read_cache(file) is not None


def test_cache_that_cannot_be_written(folder: Folder, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FlatminimaError, match="FLATMINIMA_CACHE") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)


def test_cache_folder_from_the_environment(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMINIMA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "flatminima"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "flatminima"
    monkeypatch.setenv("FLATMINIMA_CACHE", str(tmp_path / "own"))
    load_data(str(folder.path))
    assert len(list((tmp_path / "own").iterdir())) == 1

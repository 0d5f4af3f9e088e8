"""Data sets of the datasets library: saved on disk, and in files; nothing here needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from flatminima.errors import FlatminimaError
from flatminima.lab.data import Pictures, Texts, open_data
from flatminima.lab.reading import Reading
from support.images import encode_all, make_folder, random_images
from support.messages import one_line
from support.own_data import sentences

TEXTS, CLASSES = sentences(8)
IMAGES = random_images(6)
LABELS = [0, 1, 2, 1, 0, 2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def rows_of_images(**columns: Any) -> datasets.Dataset:
    cells = [{"bytes": encoded, "path": None} for encoded in encode_all(IMAGES)]
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    given = {"picture": cells, "kind": LABELS} | columns
    features = datasets.Features({name: kinds.get(name, datasets.Value("int32")) for name in given})
    return datasets.Dataset.from_dict(given, features=features)


def rows_of_texts(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "label": CLASSES} | columns)


def saved(rows: Any, folder: Path) -> str:
    with _silence():
        rows.save_to_disk(str(folder))
    return str(folder)


class _silence:  # noqa: N801
    """The library's bars of its own."""

    def __enter__(self) -> None:
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        datasets.enable_progress_bars()


@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_images_are_found_by_their_type_and_classes_as_declared(prefix: str, tmp_path: Path) -> None:
    opened = open_data(prefix + saved(rows_of_images(), tmp_path / "rows"))
    assert isinstance(opened.data, Pictures)
    assert opened.data.num_classes == 4
    assert opened.data.labels.tolist() == LABELS
    assert torch.equal(opened.data.pixels([4, 0]), IMAGES[[4, 0]])
    assert opened.about is not None
    assert "6 images from column 'picture', labels from 'kind' (4 classes)" in opened.about


def test_the_split_that_is_named_is_read(tmp_path: Path) -> None:
    rows = rows_of_images()
    folder = saved(datasets.DatasetDict({"train": rows, "held": rows.select([3])}), tmp_path / "rows")
    opened = open_data(folder, Reading(split="held"))
    assert len(opened.data) == 1
    assert opened.about is not None
    assert "split held: 1 images" in opened.about
    with pytest.raises(FlatminimaError, match="has no split 'test', only train, held: name the one") as caught:
        open_data(folder, Reading(split="test"))
    one_line(caught)


def test_images_on_disk_are_read_where_they_lie(tmp_path: Path) -> None:
    paths = []
    for i, encoded in enumerate(encode_all(IMAGES)):
        paths.append(str(tmp_path / f"{i}.png"))
        (tmp_path / f"{i}.png").write_bytes(encoded)
    data = open_data(saved(rows_of_images(picture=paths), tmp_path / "rows")).data
    assert isinstance(data, Pictures)
    assert torch.equal(data.pixels(range(6)), IMAGES)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "disk"])
def test_texts_and_their_labels_are_found(kind: str, tmp_path: Path) -> None:
    rows = rows_of_texts()
    with _silence():
        if kind == "disk":
            source = saved(rows, tmp_path / "rows")
        else:
            source = str(tmp_path / f"rows.{kind}")
            rows.to_csv(source) if kind == "csv" else rows.to_json(source)
    opened = open_data(source)
    data = opened.data
    assert isinstance(data, Texts)
    assert data.at([5, 0]) == ([TEXTS[5], TEXTS[0]],)
    assert data.labels is not None
    assert data.labels.tolist() == CLASSES
    assert data.subset([3, 6]).at([1]) == ([TEXTS[6]],)
    assert opened.about is not None
    assert "8 texts from column 'text', labels from 'label' (2 classes)" in opened.about


def test_pairs_of_texts_are_found_or_named(tmp_path: Path) -> None:
    others = TEXTS[::-1]
    rows = rows_of_texts().rename_column("text", "premise").add_column("hypothesis", others)
    folder = saved(rows, tmp_path / "rows")
    for reading in (Reading(), Reading(input_column=("premise", "hypothesis"))):
        data = open_data(folder, reading).data
        assert isinstance(data, Texts)
        assert data.at([2]) == ([TEXTS[2]], [others[2]])
    turned = open_data(folder, Reading(input_column=("hypothesis",))).data
    assert isinstance(turned, Texts)
    assert turned.at([2]) == ([others[2]],)


def test_texts_may_have_no_labels_that_are_classes(tmp_path: Path) -> None:
    data = open_data(saved(rows_of_texts(label=["x"] * 8), tmp_path / "rows")).data
    assert isinstance(data, Texts)
    assert data.labels is None
    assert "labels in column 'label' are no numbers, not integers" in data.no_labels


def test_rows_without_text_are_left_out_and_said(tmp_path: Path) -> None:
    texts = [TEXTS[0], None, " \n", *TEXTS[3:7], ""]
    opened = open_data(saved(rows_of_texts(text=texts), tmp_path / "rows"))
    assert isinstance(opened.data, Texts)
    assert opened.data.at(range(5)) == ([TEXTS[0], *TEXTS[3:7]],)
    assert opened.data.labels is not None
    assert opened.data.labels.tolist() == [CLASSES[0], *CLASSES[3:7]]
    assert opened.about is not None
    assert "3 rows without text are left out" in opened.about
    with pytest.raises(FlatminimaError, match="every row of text is blank"):
        open_data(saved(rows_of_texts(text=[" "] * 8), tmp_path / "blank"))


@pytest.mark.parametrize(
    ("rows", "reading", "said"),
    [
        (rows_of_images, {"label_column": "kinds"}, r"no column 'kinds' \(did you mean 'kind'\?\) among picture, kind"),
        (rows_of_images, {"input_column": ("kind",)}, "column 'kind' holds int64, neither images nor texts"),
        (rows_of_texts, {"label_column": "text"}, "labels in column 'text' are no numbers, not integers"),
        (lambda: rows_of_images(kind=[0, 1, None, 1, 0, 2]), {}, "labels in column 'kind' are float64, not integers"),
        (lambda: rows_of_images(kind=[0, 1, -1, 1, 0, 2]), {}, r"label -1 in row 2 is outside 0\.\.3"),
        (lambda: rows_of_images().remove_columns("kind"), {}, "no column of labels among picture: name it"),
        (lambda: rows_of_texts().remove_columns("text"), {}, r"no column of images or texts, only label \(int64\)"),
        (
            lambda: rows_of_texts(label=CLASSES).rename_columns({"text": "one"}).add_column("two", TEXTS),
            {},
            "any of the columns one, two may be the network's input: name it",
        ),
        (rows_of_texts, {"resize": "8"}, "resize: only images of 8 bits are prepared here, and .* gives texts"),
    ],
)
def test_rows_that_are_wrong_are_one_line(rows: Any, reading: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(rows(), tmp_path / "rows")
    with pytest.raises(FlatminimaError, match=said) as caught:
        open_data(folder, Reading(**reading))
    assert folder in one_line(caught)


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    cells = [{"bytes": encoded, "path": None} for encoded in encode_all(IMAGES)]
    cells[4] = {"bytes": b"nothing", "path": None}
    data = open_data(saved(rows_of_images(picture=cells), tmp_path / "rows")).data
    assert isinstance(data, Pictures)
    with pytest.raises(FlatminimaError, match="cannot decode image 4"):
        data.fetch(range(6))


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto anywhere")

    with pytest.raises(FlatminimaError, match="there is no file"):
        open_data(str(tmp_path / "rows.csv"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FlatminimaError, match=r"hf:imdb: datasets cannot load it \(no route.*connect") as caught:
        open_data("hf:imdb")
    one_line(caught)


def test_a_name_of_the_hub_may_have_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train": rows_of_texts()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_data("hf:nyu-mll/glue:sst2").data) == 8
    open_data("hf:imdb")
    assert asked == [("nyu-mll/glue", "sst2"), ("imdb", None)]
    rows = datasets.DatasetDict({"train": rows_of_texts().select([])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: rows)
    with pytest.raises(FlatminimaError, match="hf:imdb, split train is empty"):
        open_data("hf:imdb")


def test_columns_of_a_folder_of_parquet_files_may_be_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "flowers", image_column="photo", label_column="species")
    data = open_data(str(folder.path), Reading(input_column=("photo",), label_column="species")).data
    assert isinstance(data, Pictures)
    assert torch.equal(data.pixels(range(7)), folder.train_images)
    with pytest.raises(FlatminimaError, match="cifar10 has its own columns"):
        open_data("cifar10", Reading(label_column="fine_label"))

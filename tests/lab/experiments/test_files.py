from __future__ import annotations

import json
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments import plain, read_summaries

RESULTS = sorted((Path(__file__).parents[3] / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_published_results_are_read_and_keep_their_keys_and_values(path: Path) -> None:
    published, again = json.loads(path.read_text(encoding="utf-8")), plain(read_summaries(path))
    assert holds(again, published)


def holds(ours: object, theirs: object) -> bool:
    """Whether everything of theirs is in ours; an infinite end of an interval, which JSON has not, is None in both."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(key in ours and holds(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return isinstance(ours, list) and len(ours) == len(theirs) and all(map(holds, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("text", ["", "[", "{}", "[{}]", '[{"name": 7}]'])
def test_other_files_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(FlatminimaError, match=r"some.json holds no summaries of experiments \(") as refused:
        read_summaries(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(FlatminimaError, match=r"cannot read .*other\.json: No such file"):
        read_summaries(tmp_path / "other.json")

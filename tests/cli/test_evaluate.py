from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flatminima import cli
from flatminima.errors import FlatminimaError
from flatminima.protocols import Ledger, evaluate, kendall
from support.command_line import error_of
from support.ledgers import random_frame

COLUMNS = ["--hyper-parameters", "lr", "optimizer", "--test-size", "1000"]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the usual names, a measure called ``log|x|`` that text must not break, and a column of text."""
    frame = random_frame(31, seeds=5).rename(columns={"error": "test_error", "loss": "train_loss"})
    frame["log|<x>"] = -frame["x"]
    frame.to_csv(tmp_path / "ledger.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return "ledger.csv"


def test_the_json_has_every_protocol_with_value_and_interval(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", ledger, *COLUMNS, "--measures", "x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    columns = {"hyper_parameters": ["lr", "optimizer"], "measures": ["x"], "test_size": 1000}
    expected = evaluate(Ledger.read(ledger, error="test_error", given="train_loss", **columns))
    assert found.pop("report") == "evaluation.html"
    assert Path("evaluation.html").exists()
    assert found == json.loads(json.dumps(expected.to_dict()))
    names = ("kendall", "partial_kendall", "granulated_kendall", "conditional_mutual_information", "sign_error")
    for name in names:
        finding = found["measures"]["x"][name]
        low, high = finding["interval"]
        assert isinstance(finding["value"], float)
        assert low <= high
        assert finding["n"] == 30


def test_a_page_that_cannot_be_written_in_the_end_takes_nothing_from_what_is_printed(
    ledger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, content: object) -> None:
        raise FlatminimaError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("flatminima.files.write_whole", no_space)
    assert cli.main(["evaluate", ledger, *COLUMNS, "--measures", "x"]) == 2
    said = capsys.readouterr()
    assert "30 minima of" in " ".join(said.out.split())
    assert "evaluation.html" not in said.out
    assert said.err.splitlines()[-1].endswith("error: cannot write evaluation.html: No space left on device")


class _Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loaded, self.tags = "", list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_and_the_terminal_say_the_same(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", ledger, *COLUMNS, "--seed-column", "seed", "--report", "deep/page.html"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    shown = " ".join(captured.out.split())
    page = _Page()
    page.feed(Path("deep/page.html").read_text(encoding="utf-8"))
    assert (page.tags.count("svg"), page.tags.count("script"), page.loaded) == (1, 0, [])
    columns = {"hyper_parameters": ["lr", "optimizer"], "seed": "seed", "test_size": 1000}
    found = evaluate(Ledger.read(ledger, error="test_error", given="train_loss", **columns))
    assert list(found.measures) == ["x", "log|<x>"]
    for line in found.conclusions():
        assert line in page.text
        assert line in shown
    assert f"{found.measures['x'].partial_kendall.value:.2f}" in shown
    assert "deep/page.html shows it in pictures." in shown


def test_the_usual_columns_are_found_and_others_named(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", ledger, "--accuracy", "test_error", "--measures", "x", "--json"]) == 0
    turned = json.loads(capsys.readouterr().out)["measures"]["x"]
    as_error = Ledger.read(ledger, error="test_error", measures=["x"])
    assert turned["kendall"]["value"] == pytest.approx(-(kendall(as_error, "x").value or 0))
    assert turned["granulated_kendall"]["reason"] == "no hyper-parameters are named"


def test_bad_input_is_one_line(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "takes a ledger" in error_of(capsys, ["evaluate"])
    both = ["evaluate", ledger, "--error", "test_error", "--accuracy", "x"]
    assert "error and accuracy are the same turned round" in error_of(capsys, both)
    assert "cannot read none.csv: No such file" in error_of(capsys, ["evaluate", "none.csv"])
    assert "(did you mean 'test_error'?)" in error_of(capsys, ["evaluate", ledger, "--error", "test_eror"])
    assert "did you mean '--measures'?" in error_of(capsys, ["evaluate", ledger, "--measure", "x"])
    assert "holds something else than numbers" in error_of(capsys, ["evaluate", ledger, "--measures", "setting"])
    Path("other.csv").write_text("a,b\n1,2\n")
    assert "name the column of the test error" in error_of(capsys, ["evaluate", "other.csv"])


def test_a_page_that_cannot_be_written_is_refused_before_the_ledger_is_read(
    ledger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert cli.main(["evaluate", "nowhere.csv", "--report", "deep/page.html", "--no-progress"]) == 2
    message = "flatminima: error: cannot write deep/page.html: its folder is read-only; choose another one\n"
    assert capsys.readouterr().err == message


def test_what_is_left_out_is_a_warning_in_a_line(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(ledger).open("a") as file:
        file.write(",,,,,,,\n")
    assert cli.main(["evaluate", ledger, "--measures", "x"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "flatminima: warning: left out, as a value is missing or infinite in test_error: row 31"

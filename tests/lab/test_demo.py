from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from flatminima.lab import demo, study
from flatminima.lab.experiments import Summary, json_of, read_summaries, select, summarize
from flatminima.lab.jobs import Local
from flatminima.lab.runs.measuring import Measuring

pytestmark = pytest.mark.xdist_group("demo")  # they share one demo


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[demo.DemoResult, Path, str]]:
    """The whole demo on two sizes, two seeds and short runs; and what it says meanwhile."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONFUSION", (0, 200))
        patch.setattr(demo, "SEEDS", (7, 8))
        patch.setattr(demo, "MEASURING", Measuring(subset_size=20, trials=3, on_singular="skip"))
        arms = {name: dataclasses.replace(spec, epochs=(spec.epochs or 0) // 4) for name, spec in demo.ARMS.items()}
        patch.setattr(demo, "ARMS", arms)
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        yield demo.demo(out, workers=2), out, said.getvalue()


def test_summary_holds_every_run_and_survives_json(small: tuple[demo.DemoResult, Path, str]) -> None:
    report, out, _ = small
    minima, regularizer = report.summaries
    assert len(regularizer.records) == 2 * 2 * 3
    assert {(row.arm, row.case, row.seed) for row in regularizer.records} == {
        (arm, case, seed) for arm in demo.ARMS for case in ("0", "200") for seed in (7, 8)
    }
    assert list(minima.records) == select(regularizer.records, "plain")
    assert json.loads((out / "report.json").read_text()) == json_of(report.summaries)
    assert json_of(read_summaries(out / "report.json")) == json_of(report.summaries)
    assert "NaN" not in (out / "report.json").read_text()


def test_statistics_are_those_of_the_outcomes(small: tuple[demo.DemoResult, Path, str]) -> None:
    minima, regularizer = small[0].summaries
    rows = minima.records
    tau = stats.kendalltau([r.value("fisher_trace") for r in rows], [r.test_error for r in rows]).statistic
    assert minima.correlations["fisher_trace"].tau == pytest.approx(tau)
    regularized, plainly = (select(regularizer.records, arm, "200") for arm in ("regularized", "plain"))
    mean = sum(a.test_error - b.test_error for a, b in zip(regularized, plainly, strict=True)) / 2
    (found,) = (d for d in regularizer.differences if (d.case, d.against) == ("200", "plain"))
    assert found.mean == pytest.approx(mean)
    losses = sum(a.value("train_loss") - b.value("train_loss") for a, b in zip(regularized, plainly, strict=True)) / 2
    (found,) = (d for d in regularizer.beside["train_loss"] if (d.case, d.against) == ("200", "plain"))
    assert found.mean == pytest.approx(losses)


def test_every_setting_is_said_in_a_line_once_it_is_known(small: tuple[demo.DemoResult, Path, str]) -> None:
    report, _, said = small
    headings, lines = [], []
    for line in said.splitlines():
        (lines if line.startswith("randomly labelled") else headings).append(line)
    assert len(lines) == 2 + 2 * 3
    assert [heading.partition("?")[0] for heading in headings] == [s.title.rstrip("?") for s in report.summaries]
    rows = select(report.summaries[1].records, "regularized", "200")
    (line,) = (line for line in lines if line.startswith("randomly labelled images 200, regularized: test error "))
    assert f"test error {50 * (rows[0].test_error + rows[1].test_error):.2f} ±" in line
    assert line.endswith("(2 runs)")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.pictures += tag == "svg"
        for name in ("src", "href", "xlink:href"):
            value = given.get(name)
            if value and not value.startswith(("#", "data:")):
                self.loaded.append(value)
        assert tag != "script"


def test_page_is_self_contained(small: tuple[demo.DemoResult, Path, str]) -> None:
    _, out, _ = small
    text = (out / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.loaded == []
    assert page.pictures == len(demo.DRAWN) + 4
    assert "var(--ink)" in text  # of figures: they have the page's colours, in light and in dark
    assert "#0101" not in text


def test_table_and_conclusions_are_made_from_the_numbers(small: tuple[demo.DemoResult, Path, str]) -> None:
    minima, regularizer = small[0].summaries
    text = printed(minima, regularizer)
    assert "Kendall's τ" in text
    assert f"{minima.correlations['log_det_fisher'].tau:+.2f}" in text
    experiment = demo.DemoStudy(Path("nowhere"), Local(), 1).experiment("regularizer")
    plainly = {record.seed: record.test_error for record in select(regularizer.records, "plain, equal cost", "0")}
    harmed = [
        dataclasses.replace(record, test_error=plainly[record.seed] + 0.1 + 1e-4 * (-1) ** record.seed)
        if (record.arm, record.case) == ("regularized", "0")
        else record
        for record in regularizer.records
    ]
    verdict = summarize(experiment, harmed).verdict
    assert any("With 0 randomly labelled images the regularizer harms: test error +10.0 points" in v for v in verdict)


def printed(*summaries: Summary) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(study.table(summaries))
    return console.export_text()


def test_a_second_call_trains_nothing(small: tuple[demo.DemoResult, Path, str]) -> None:
    report, out, _ = small
    checkpoints = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.safetensors")}
    assert len(checkpoints) == len(report.summaries[1].records)
    again = demo.demo(out, workers=2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.safetensors")} == checkpoints
    assert [summary.records for summary in again.summaries] == [summary.records for summary in report.summaries]

from __future__ import annotations

import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from flatminima.lab import demo
from flatminima.lab.experiments.experiment import select
from flatminima.lab.runs.measuring import Measuring

pytestmark = pytest.mark.xdist_group("demo")  # they share one demo


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The whole demo on two sizes, two seeds and short runs."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONFUSION", (0, 200))
        patch.setattr(demo, "SEEDS", (7, 8))
        patch.setattr(demo, "MEASURING", Measuring(subset_size=20, trials=3, on_singular="skip"))
        arms = {name: dataclasses.replace(spec, epochs=(spec.epochs or 0) // 4) for name, spec in demo.ARMS.items()}
        patch.setattr(demo, "ARMS", arms)
        yield demo.demo(out, workers=2, progress=False), out


def test_summary_holds_every_run_and_survives_json(small: tuple[dict[str, Any], Path]) -> None:
    summary, out = small
    assert len(summary["outcomes"]) == 2 * 2 * 3
    assert {(row["arm"], row["case"], row["seed"]) for row in summary["outcomes"]} == {
        (arm, case, seed) for arm in demo.ARMS for case in ("0", "200") for seed in (7, 8)
    }
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert "NaN" not in (out / "summary.json").read_text()


def test_statistics_are_those_of_the_outcomes(small: tuple[dict[str, Any], Path]) -> None:
    summary, _ = small
    rows = select(summary["outcomes"], "plain")
    tau = stats.kendalltau([r["indicators"]["fisher_trace"] for r in rows], [r["test_error"] for r in rows]).statistic
    assert summary["rank_correlation"]["fisher_trace"]["tau"] == pytest.approx(tau)
    regularized, plain = select(summary["outcomes"], "regularized", "200"), select(summary["outcomes"], "plain", "200")
    mean = sum(a["test_error"] - b["test_error"] for a, b in zip(regularized, plain, strict=True)) / 2
    assert summary["regularized_minus"]["plain"]["200"]["test_error"]["mean"] == pytest.approx(mean)


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


def test_page_is_self_contained(small: tuple[dict[str, Any], Path]) -> None:
    _, out = small
    page = _Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert page.loaded == []
    assert page.pictures == 2 * (len(demo.INDICATORS) + 3)


def test_table_and_conclusions_are_made_from_the_numbers(small: tuple[dict[str, Any], Path]) -> None:
    summary, _ = small
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(demo.table(summary))
    text = console.export_text()
    assert "Kendall's τ" in text
    assert f"{summary['rank_correlation']['log_det_fisher']['tau']:+.2f}" in text
    harmful = json.loads(json.dumps(summary))
    harmful["regularized_minus"]["plain, equal cost"]["0"]["test_error"] = {
        "mean": 0.1,
        "low": 0.05,
        "high": 0.15,
    }
    assert any("harms: test error +10.0 points" in line for line in demo.conclusions(harmful))


def test_a_second_call_trains_nothing(small: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    summary, out = small
    checkpoints = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.safetensors")}
    assert len(checkpoints) == len(summary["outcomes"])
    again = demo.demo(out, workers=2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.safetensors")} == checkpoints
    assert again["outcomes"] == summary["outcomes"]

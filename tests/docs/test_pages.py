"""What the site's pages are made of: records as tables, a place for every public name and every command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from types import ModuleType

import pytest

import flatminima
from flatminima.lab.reports import figures, tables
from support.documents import ROOT

PUBLIC = {
    "flatminima",
    *(f"flatminima.{name}" for name in ("errors", "exact", "gramian", "gramian.rules", "losses", "measures")),
    *(f"flatminima.{name}" for name in ("protocols", "regularizer", "theory")),
    *(f"flatminima.integrations.{name}" for name in ("accelerate", "lightning", "transformers")),
}
REFERENCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.md")))
FOLDERS = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("extensions.tables")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_record_can_be_shown_and_has_a_page(folder: str, made: ModuleType) -> None:
    for summary in made.summaries_of(folder):
        assert all(table.markdown() for table in tables(summary))
        first = summary.drawn[:1]  # drawing all takes seconds
        assert len(figures(dataclasses.replace(summary, drawn=first))) == len(first)
    assert f"{{record}} {folder}\n" in (ROOT / "docs" / "results" / f"{folder}.md").read_text(encoding="utf-8")


def test_rankings_are_those_of_the_records(made: ModuleType) -> None:
    table = made.rankings_table(["small"])
    record = json.loads((ROOT / "results" / "small" / "scenario-1.json").read_text(encoding="utf-8"))
    found = record[0]["correlations"]["log_det_fisher"]
    row = next(row for row in table.rows if row[0] == "γ̂")
    assert row[1] == f"{found['tau']:+.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    assert len(row) == len(table.header) == 4


def test_costs_are_those_of_the_record_and_say_what_is_off(made: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "gram.json").read_text(encoding="utf-8"))["networks"]
    table = made.cost_of_gram("gram.json")
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    ratio = record["resnet20"]["methods"]["flatminima"]["ratio"]
    assert cells["resnet20"]["flatminima"].startswith(
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )
    assert "off by" in cells["gpt2"]["opacus"]
    assert cells["resnet20"]["opacus"] == "–"
    memory = made.memory_of_gram("gram.json")
    held = dict(zip(memory.header, next(row for row in memory.rows if row[0] == "resnet20"), strict=True))
    assert held["flatminima"] == f"{record['resnet20']['methods']['flatminima']['peak_bytes'] / 2**20:,.0f}"
    assert held["opacus"] == "–"


def test_costs_of_small_networks_are_those_of_the_record_with_their_range(made: ModuleType) -> None:
    """And what the pages say in words is so: where plain steps take milliseconds, sub-batches together cost less."""
    record = json.loads((ROOT / "benchmarks" / "results" / "regularizer-small.json").read_text(encoding="utf-8"))
    table = made.cost_of_small_steps()
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    one_by_one = "finite-difference, M=8, main_gradient=sub-batches"
    for name, steps in record["networks"].items():
        found = steps[one_by_one]["ratio"]
        assert cells[one_by_one][name] == f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
        if name in ("digits-mlp", "small-cnn-16"):
            assert steps[f"{one_by_one}, passes=together"]["ratio"]["median"] < found["median"]


def test_tables_of_benchmarks_are_whole(made: ModuleType) -> None:
    for name, (_, make) in made.BENCHMARK_TABLES.items():
        table = make()
        assert table.rows, name
        assert {len(row) for row in table.rows} == {len(table.header)}, name


def test_a_trial_of_measure_costs_what_its_record_says(made: ModuleType) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "measure.json").read_text(encoding="utf-8"))
    ratio = found["networks"]["resnet20"]["parts"]["ξ by itself"]
    table = made.cost_of_measure("measure.json")
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    expected = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    assert cells["ξ by itself"]["resnet20, N' = 100"] == expected


def test_every_public_module_is_in_the_reference() -> None:
    assert set(re.findall(r"automodule:: (\S+)", REFERENCE)) == PUBLIC


def test_every_public_name_is_in_the_reference_once() -> None:
    """What stands under ``flatminima`` is left out of the module's page, as is what serves the library alone."""
    directive = r"automodule:: (\S+)\n(?:   :(?!exclude)\S.*\n)*(?:   :exclude-members: (.*)\n)?"
    pages = {module: set(filter(None, left_out.split(", "))) for module, left_out in re.findall(directive, REFERENCE)}
    for name in PUBLIC - {"flatminima"} - {name for name in PUBLIC if "integrations" in name}:
        module = importlib.import_module(name)
        offered = getattr(module, "__all__", vars(module))
        own = {n for n in flatminima.__all__ if n in offered and getattr(flatminima, n).__module__.startswith(name)}
        assert own <= pages[name] <= set(offered), name


def test_every_command_is_in_the_reference() -> None:
    from flatminima.cli.commands import COMMANDS

    assert set(re.findall(r"\{command-help\} (\S+)", REFERENCE)) == {"flatminima", *COMMANDS}


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", "README.md", "results/README.md"])
def test_files_that_a_guide_names_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = re.findall(r"[`(]((?:[\w.-]+/)+[\w.-]+\.(?:py|md|txt|json|svg))[`)]", text)
    roots = (ROOT, ROOT / "src" / "flatminima", ROOT / "tests")
    assert named
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_the_citation_names_the_version_and_the_changelog_has_it() -> None:
    """The version stands in pyproject.toml; the files that must repeat it agree."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.M)
    assert released is not None
    assert f"version: {version}\ndate-released: {released[1]}\n" in citation
    assert changelog.index("## [Unreleased]") < released.start()

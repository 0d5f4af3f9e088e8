"""Every code block of the README and of the site runs, or says why it does not; every command is one that there is."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import flatminima as fm
from flatminima.cli.completion import COMPLETION
from flatminima.gramian.rules import temporary_rules
from support.documents import DOCUMENTS, ROOT, Block, blocks_of, files_with, readers_names, run

AT_HOME = {
    "CONTRIBUTING.md": (
        "flatminima.gramian.rules",
        "flatminima.lab.data.sources",
        "flatminima.lab.experiments.paper",
        "flatminima.lab.networks.paper",
        "flatminima.measures.catalogue.margin",
    ),
    "docs/ideas/rules.md": ("flatminima.gramian.rules.linear",),
    "docs/reference/experiments.md": ("flatminima.lab.experiments.paper",),
}
"""Pages whose blocks are to be put into files of ours, and files whose names they then have."""

REGISTRIES = {
    "flatminima.lab.data.sources": "LOADERS",
    "flatminima.lab.experiments.paper": "EXPERIMENTS",
    "flatminima.lab.networks.paper": "BUILDERS",
    "flatminima.measures": "CATALOGUE",
}
"""What blocks may add to, for as long as they are tested."""


def names_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def _registries_restored() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(temporary_rules())
        for module, registry in REGISTRIES.items():
            stack.enter_context(patch.dict(getattr(importlib.import_module(module), registry)))
        yield


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages read; measuring is cheap in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("measure", "compare"):
        full = getattr(fm, name)

        def cheap(*args: Any, full: Any = full, **options: Any) -> Any:
            return full(
                *args, **{"subset_size": 10, "progress": False, **options, "trials": 5, "max_standard_error": None}
            )

        monkeypatch.setattr(fm, name, cheap)
    return tmp_path


def prepared(path: Path, folder: Path) -> dict[str, Any]:
    """The names of a page's reader, and the files that its blocks read."""
    names = {**readers_names(), "fm": fm, "flatminima": fm}
    for module in AT_HOME.get(names_of(path), ()):
        names |= {name: value for name, value in vars(importlib.import_module(module)).items() if name[:2] != "__"}
    page = path.read_text(encoding="utf-8")
    if "checkpoint.pt" in page:
        torch.save(names["model"].state_dict(), folder / "checkpoint.pt")
    if "ledger.csv" in page:
        rows = [
            f"{lr},{batch},{seed},{lr * seed},{seed},{lr + seed}"
            for lr in (1, 2)
            for batch in (8, 16)
            for seed in range(5)
        ]
        header = "lr,batch_size,seed,test_error,train_loss,log_det_fisher"
        (folder / "ledger.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return names


@pytest.mark.usefixtures("_registries_restored")
@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("path", files_with("python"), ids=names_of)
def test_code_runs(path: Path, at_work: Path) -> None:
    names = prepared(path, at_work)
    for block in blocks_of(path, "python"):
        if block.reason is None:
            run(block, names)


COMMANDS = [
    pytest.param(line.split("  #")[0].strip(), id=f"{block}: {line.strip()[:60]}")
    for path in DOCUMENTS
    for block in blocks_of(path, "console")
    for line in block.code.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_there_is(command: str) -> None:
    """With options that exist; nothing is run."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["flatminima", *words[words.index("flatminima") + 1 :]]
    if words[0] == "flatminima" and words[1] in COMPLETION:
        assert words[2] in ("bash", "zsh", "tcsh")
    elif words[0] == "flatminima":
        from flatminima.cli.commands import recipe_of
        from flatminima.cli.evaluate import Evaluate
        from flatminima.cli.options import Compare, Demo, Measure, Reproduce, RunOptions, Train, parse
        from flatminima.cli.track import Track
        from flatminima.lab.runs import RECIPES

        kinds = {kind.__name__.lower(): kind for kind in (Compare, Demo, Evaluate, Measure, Reproduce, Track, Train)}
        given, more = words[2:], {}
        if words[1] == "train":
            recipe, given = recipe_of(given)
            more = {"default": Train(RunOptions.of(RECIPES[recipe]))}
        parse(kinds[words[1]], given, prog=words[1], **more)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", words[2])
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", declared, re.M) for extra in extras)
    else:
        pytest.fail(f"unknown command {words[0]}")


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
PAGES = [*DOCUMENTS, *(ROOT / name for name in ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md"))]


@pytest.mark.parametrize("path", PAGES, ids=names_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    assert [link for link in LINK.findall(text) if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=names_of)
def test_every_block_names_its_language(path: Path) -> None:
    fences = re.findall(r"^ *```(.*)$", path.read_text(encoding="utf-8"), re.M)
    assert "" not in fences[::2], "a block without a language is not tested"


def test_a_block_that_is_not_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "<!-- not run: needs a cluster -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    )
    assert [block.reason for block in blocks_of(tmp_path / "page.md", "python")] == ["needs a cluster", None]
    assert [block.line for block in blocks_of(tmp_path / "page.md", "python")] == [3, 7]


def test_a_block_fails_at_its_own_line() -> None:
    block = Block(ROOT / "page.md", 7, "python", "x = 1\n1 / 0\n", None)
    with pytest.raises(ZeroDivisionError) as raised:
        run(block, {})
    assert raised.traceback[-1].lineno == 7  # counted from 0

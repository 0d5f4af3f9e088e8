"""Code blocks of Markdown files, and the names that their readers have already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [path for path in DOCUMENTS if not {"_build", "gallery"} & set(path.parts)]

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
"""A fenced block; one that a test is not to run says why in a comment on the line above."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    path: Path
    line: int
    language: str
    code: str
    reason: str | None
    """Why it is not run."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path, *languages: str) -> Iterator[Block]:
    """A file's blocks in one of some languages, in their order."""
    text = path.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        block = Block(path, line, match["language"], match["code"], match["reason"])
        if block.language in languages:
            yield block


def files_with(*languages: str) -> list[Any]:
    """Those that have such blocks."""
    return [path for path in DOCUMENTS if any(blocks_of(path, *languages))]


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run it as if it stood at its place in the file."""
    source = "\n" * (block.line - 1) + block.code
    exec(compile(source, str(block.path), "exec"), namespace)


def readers_names() -> dict[str, Any]:
    """What a reader has: models that fit their training data, a loader, a loss, an optimizer."""
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    inputs = torch.randn(120, 20) + 20 * nn.functional.one_hot(labels, 20)

    def fitted(scale: float) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
        with torch.no_grad():
            for layer in model.children():
                layer.weight.mul_(0.05).add_(scale * torch.eye(*layer.weight.shape))
                layer.bias.zero_()
        return model

    train_set = TensorDataset(inputs, labels)
    model = fitted(0.4)
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "model_a": fitted(0.4),
        "model_b": fitted(0.41),
        "models": {"a": fitted(0.4), "b": fitted(0.41)},
        "train_set": train_set,
        "loader": DataLoader(train_set, batch_size=32),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
    }

"""How much memory a device has to spare: of a machine's, what the container or job may use of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

FREE_SHARE = 0.5
"""The part of the free memory that is used if the user names no budget."""

_UNKNOWN = 8 * 2**30
"""Where the system does not tell: what a laptop has to spare."""


def default_budget(device: torch.device) -> int:
    """Bytes that are used where the user names no budget."""
    return int(FREE_SHARE * free_bytes(device))


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Free memory of the device. On a CPU the least of what the machine has and what control groups leave.

    Args:
        device: a GPU, or the CPU.
        root: where the system's ``proc`` and ``sys`` are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _numbers(root / "proc/meminfo").get("MemAvailable:")
    machine = _UNKNOWN if available is None else available * 1024
    return max(0, min([machine, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each limit on the memory of this process's control groups leaves (version 2, and 1 by its own names).

    The limits of outer groups hold as well. In a container the path that the kernel names may be the host's, and what
    is mounted the container's own group: then the path's end is not there, and the mount's root is what counts.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        path = Path(group.strip().lstrip("/"))
        for folder in (root / mount / path, *(root / mount / outer for outer in path.parents)):
            allowed, used = _number(folder / limit), _number(folder / usage)
            if allowed is not None:
                # files in the page cache give way, and so count as free, as in MemAvailable
                numbers = _numbers(folder / "memory.stat")
                cached = sum(numbers.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
                yield allowed - (used or 0) + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The one that is the file's content; None for another word ("max"), and where there is no such file."""
    content = "".join(_lines(path)).strip()
    return int(content) if content.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Those in lines of a word and a number."""
    found = (line.split() for line in _lines(path))
    return {words[0]: int(words[1]) for words in found if len(words) > 1 and words[1].isdecimal()}

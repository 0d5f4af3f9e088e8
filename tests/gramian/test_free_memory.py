from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatminima.gramian.memory import default_budget, free_bytes

GIB = 2**30
CPU = torch.device("cpu")
MACHINE = {"proc/meminfo": "MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n"}  # 16 GiB
V2 = {"proc/self/cgroup": "0::/outer/job\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/a:b\n0::/\n"}
UNLIMITED = "9223372036854771712\n"

SYSTEMS: dict[str, tuple[dict[str, str], float]] = {
    "none": (MACHINE, 16),
    "one that tells nothing": ({}, 8),
    "2, no limit": (MACHINE | V2 | {"sys/fs/cgroup/outer/job/memory.max": "max\n"}, 16),
    "2": (
        MACHINE
        | V2
        | {
            "sys/fs/cgroup/outer/job/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/outer/job/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/outer/job/memory.stat": f"file {GIB}\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\n",
        },
        4,
    ),
    "2, of an outer group": (
        MACHINE
        | V2
        | {
            "sys/fs/cgroup/outer/job/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/outer/memory.max": f"{5 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{3 * GIB}\n",
        },
        2,
    ),
    "2, in a container": (MACHINE | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{3 * GIB}\n"}, 3),
    "2, above what is free": (MACHINE | V2 | {"sys/fs/cgroup/outer/job/memory.max": f"{20 * GIB}\n"}, 16),
    "2, passed": (
        MACHINE
        | V2
        | {
            "sys/fs/cgroup/outer/job/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/outer/job/memory.current": f"{2 * GIB}\n",
        },
        0,
    ),
    "1, no limit": (MACHINE | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED}, 16),
    "1": (
        MACHINE
        | V1
        | {
            "sys/fs/cgroup/memory/docker/a:b/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/docker/a:b/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/docker/a:b/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        },
        2,
    ),
    "1, the host's path in a container": (
        MACHINE | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n"},
        3,
    ),
}


@pytest.mark.parametrize(("files", "free"), SYSTEMS.values(), ids=SYSTEMS)
def test_what_is_free_is_so_on_the_machine_and_within_each_control_groups_limit(
    files: dict[str, str], free: float, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert free_bytes(CPU, tmp_path) == free * GIB


def test_half_of_what_is_free_here_is_used() -> None:
    assert 0 < default_budget(CPU) < torch.iinfo(torch.int64).max / 2

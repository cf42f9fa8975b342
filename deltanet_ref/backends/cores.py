"""How many processor cores this process may use."""

import math
import os
from pathlib import Path

CGROUPS, OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that the scheduler and the CPU quotas of the process's control groups allow it, at least 1.

    A quota that is not whole counts as the next whole core. Where the system has neither affinity masks nor control
    groups, all cores count.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas():
    """CPU quotas, in cores, of the process's control groups and of those that contain them (v2, and v1's controller
    "cpu")."""
    quotas = []
    for line in _read(OF_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUPS / controllers if controllers else CGROUPS
        group = top / path.lstrip("/")
        for directory in [group, *group.parents]:
            quota, period = _limit_v1(directory) if controllers else _limit_v2(directory)
            if quota > 0 and period > 0:
                quotas.append(quota / period)
            if directory == top:
                break
    return quotas


def _limit_v2(directory):
    """Microseconds of CPU and the period that they are for; 0, 0 without a limit."""
    quota, _, period = _read(directory / "cpu.max").partition(" ")
    return (int(quota), int(period)) if quota.isdigit() else (0, 0)


def _limit_v1(directory):
    quota, period = (_read(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return (int(quota), int(period)) if quota.isdigit() and period.isdigit() else (0, 0)  # -1: no limit


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ""

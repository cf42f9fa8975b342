"""The peak of this process's resident memory, phase by phase.

Pages mapped from a file count from their first use on.
"""

import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets VmHWM to what is resident now


def peak_memory() -> int:
    """Peak in bytes, since start_phase on Linux, otherwise since the process began."""
    if STATUS.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def start_phase() -> int:
    """Reset the peak, where the system allows it; returns the peak until now in bytes."""
    peak = peak_memory()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # no such file, or not writable: the peak stays that of the whole process
        pass
    return peak

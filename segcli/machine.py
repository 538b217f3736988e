"""What kind of machine this is, and how much of it this process has used."""

import platform
import subprocess
import sys
from pathlib import Path

if sys.platform != "win32":
    import resource


def peak_rss_bytes() -> int | None:
    """Returns the most memory this process has held, None where the system does not say."""
    try:
        # ru_maxrss on Linux begins with what the parent held when it started this process.
        status = Path("/proc/self/status").read_text()
        return next(int(s.split()[1]) * 1024 for s in status.splitlines() if s[:6] == "VmHWM:")
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kibibytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Returns the processor's name as the system gives it, at least its architecture."""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine() or "unknown"

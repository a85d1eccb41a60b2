"""How much memory this machine has left, where the system tells. No torch."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Bytes that programs could still take, within a container's limit; None when unknown."""
    amounts = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        amounts.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        limit = int((cgroup / "memory.max").read_text())
        amounts.append(limit - int((cgroup / "memory.current").read_text()) + _reclaimable(cgroup))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(0, min(amounts)) if amounts else None


def _reclaimable(cgroup: Path) -> int:
    """Bytes of files that the container holds in memory, and would give up."""
    for line in (cgroup / "memory.stat").read_text().splitlines():
        name, _, amount = line.partition(" ")
        if name == "inactive_file":
            return int(amount)
    return 0

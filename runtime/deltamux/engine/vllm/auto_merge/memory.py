"""The memory that this process can still take."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory(cgroup: Path = CGROUP) -> int:
    """Returns the bytes that the kernel, and the container (`cgroup`, version 2), have left: the less of the two."""
    available = _fields(Path("/proc/meminfo"))["MemAvailable:"] << 10
    limit = cgroup / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return available
    # Pages of files that were read count as used, though the kernel takes them back at need.
    used = int((cgroup / "memory.current").read_text()) - _fields(cgroup / "memory.stat").get("inactive_file", 0)
    return min(available, max(0, int(most) - used))


def _fields(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}

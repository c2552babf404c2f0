"""Free memory, found without torch, so that nobody has to wait for its import."""

import math
import re
from pathlib import Path


def free_ram_bytes(root: Path = Path("/")) -> float:
    """Memory that this process can still take: what the system has available or what its cgroup (version 1 or 2), or
    one around it, still allows, whichever is less. A container limits its memory by a cgroup, but shows that of the
    whole machine. nan if the system does not say."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return math.nan
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1])
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = mount / group.strip("/")
        for level in (folder, *folder.parents):
            # In a container the path can be that of the host: what is not there is skipped.
            if level.is_relative_to(mount) and (level / names[0]).exists():
                free = min(free, _left_in_cgroup(level, *names))
    return free


def _left_in_cgroup(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> float:
    limit = (folder / limit_name).read_text().strip()
    if limit == "max":
        return math.inf
    # Files that were read count as usage, but give way.
    cache = re.search(rf"^{cache_name} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    return max(0, int(limit) - int((folder / usage_name).read_text()) + int(cache[1] if cache else 0))

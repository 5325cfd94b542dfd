"""What Ray has set aside for this process."""

from __future__ import annotations

import ray


def threads_here(device: str) -> int | None:
    """For an engine: one per core of this worker's, not of the machine's."""
    if device.startswith("cuda"):
        return None
    cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, int(cores))

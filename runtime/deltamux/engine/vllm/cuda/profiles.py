"""`GraphProfile`: what a CUDA graph holds in addition to the base, and the reserved slots by which it is captured.

A graph is captured with all kernels of a profile launched and no row of any adapter. So two slots beyond those of the
engine are reserved, one per profile: a captured step has them, and every module with kernels of the profile has them.
"""

from enum import IntEnum


class GraphProfile(IntEnum):
    """The kernels of a graph, which decide the steps that may replay it.

    LINEAR holds the kernels of linear modules alone, since most adapters are LoRA and every launch of a kernel without
    work costs its microseconds; ALL those of norms, sub-layers and scaled inputs as well.
    """

    BASE = 0
    LINEAR = 1
    ALL = 2


def captured_slots(profile: GraphProfile, num_slots: int) -> int:
    """Returns the mask of a captured step: the reserved slots of its profile and of those that it includes."""
    return ((1 << profile) - 1) << num_slots


def reserved_slot(profile: GraphProfile, num_slots: int) -> int:
    """Returns the mask of a profile's reserved slot, for the modules that have kernels in it; 0 for BASE."""
    return 1 << (num_slots + profile - 1) if profile else 0

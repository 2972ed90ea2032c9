"""What a process does first that another of deltamux's processes has started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
NICE = 10
"""Of ten ticks of a core that the engine could use, a helper takes one.

Linux's SCHED_IDLE would cost the engine less, since its threads then need not wait for the end of a helper's slice when
they wake up; but beside threads that never sleep a helper would not run at all, nor may it leave that policy again.
"""


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that ends. Does nothing outside Linux.

    The signal comes when the *thread* that started this process ends, so that thread must live as long as the parent.

    Args:
        parent: process id of the parent; if it has ended already, this process exits at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def become_helper(parent: int) -> None:
    """Makes this process a helper of its parent: it ends with it, and yields CPU and memory to it and to the engine.

    Signals of a terminal are ignored, since the parent decides when its helper ends. What is printed goes to standard
    error, since standard output is the parent's.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.nice(NICE)
    with suppress(OSError):  # outside Linux there is none, and it may be read-only
        # Where memory runs out, the kernel is to end this process, and not the engine's.
        Path("/proc/self/oom_score_adj").write_text("1000")
    end_with_parent(parent)

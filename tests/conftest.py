"""How the tests are shared out, where several processes run them (pytest-xdist)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

ENGINES = ("tests/acceptance/", "tests/benchmarks/", "tests/engine/")
"""Folders whose tests run real engines: one after the other, since each takes all cores."""

PARTS = ("merge_policy", "fast_path", "graphs", "loading", "custom_ops", "outputs", "eviction", "time_slicing")
"""Files of tests/engine/ that look at parts of an engine and start none."""


settings.register_profile("deltamux", deadline=None)  # time decides no test
settings.load_profile("deltamux")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the other process computes as well


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps all engines in one process, and each other file in one, as its fixtures are made for."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # xdist has no marker

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # so to mypy it is Any
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            part = file in {f"tests/engine/test_{name}.py" for name in PARTS}
            return "engines" if file.startswith(ENGINES) and not part else file

    config.option.loadscopereorder = False  # the engines take longest: they go first, as they are collected
    return Scheduling(config, log)

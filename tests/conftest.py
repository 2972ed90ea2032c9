"""Markers of tests, and how several processes share the tests (pytest-xdist)."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from deltamux.deltas import BaseModel

gc.disable()  # until all tests are collected: imports and parameters stay, and are a fifth of that time to look through

settings.register_profile("deltamux", deadline=None)  # time decides no test
settings.load_profile("deltamux")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the other process computes as well
        config.option.loadgroup = True  # ids of tests carry their group to the scheduler


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama."""
    from deltamux.conformance.bases import save_base  # transformers is loaded where a test needs it

    return save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="session")
def base(base_directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(base_directory)


@pytest.fixture(scope="session")
def real_engine() -> None:
    """Requested by fixtures that start an engine of vLLM: tests that use them are marked ``engine``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_engine" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.xdist_group("engines"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ:
        lost = [item.nodeid for item in session.items if item.get_closest_marker("engine") and "@" not in item.nodeid]
        assert not lost, f"engines would start beside each other: xdist adds no group to the id of {lost[0]}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps all engines in one process, since each takes all cores, and each other file in one."""
    from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]  # xdist has no marker

    class Scheduling(LoadGroupScheduling):  # type: ignore[misc]  # so to mypy it is Any
        def _split_scope(self, nodeid: str) -> str:
            group: str = super()._split_scope(nodeid)
            return group.split("::")[0]

    config.option.loadscopereorder = False  # the engines take longest: they go first, as they are collected
    return Scheduling(config, log)

"""A pytest plugin that adds the conformance suite to a run.

pytest -p deltamux.conformance.pytest_plugin --deltamux-methods mymethod --deltamux-serve
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deltamux", "conformance of fine-tuning methods")
    group.addoption("--deltamux-methods", default="", help="methods to check, separated by commas")
    group.addoption("--deltamux-serve", action="store_true", help="start the engine, too, and compare what it serves")


def pytest_configure(config: pytest.Config) -> None:
    suite = str(Path(__file__).with_name("suite.py"))
    if config.getoption("--deltamux-methods") and suite not in config.args:
        config.args.append(suite)

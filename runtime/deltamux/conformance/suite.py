"""The checks as pytest's tests; collected by `deltamux.conformance.pytest_plugin`, for the methods of its option."""

from collections.abc import Callable

import pytest

from deltamux.conformance import CHECKS, Case, cases, check_serving


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name.strip() for name in metafunc.config.getoption("--deltamux-methods").split(",")]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(*names), ids=str)
    if "check" in metafunc.fixturenames:
        metafunc.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def test_the_method_passes_every_check(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def test_what_is_served_is_what_was_trained(name: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--deltamux-serve"):
        pytest.skip("needs the engine: give --deltamux-serve")
    own = cases(name)
    check_serving(own, own[0].architecture)

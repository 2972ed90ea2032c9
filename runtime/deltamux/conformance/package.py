"""Checks an installed package: its plugins load, its ops are ops, its methods pass the conformance suite."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

from deltamux.conformance.cases import Case, Refused, cases
from deltamux.conformance.checks import CHECKS
from deltamux.conformance.serving import check_serving
from deltamux.deltas.ops import ENTRY_POINT_GROUP as OPS_GROUP
from deltamux.deltas.ops import op_class
from deltamux.errors import DeltamuxError, NotFoundError
from deltamux.hookspecs import ENTRY_POINT_GROUP as METHODS_GROUP
from deltamux.registry import Registry


@dataclass(frozen=True)
class Outcome:
    """One check of one method or op; `problem` is empty where it is kept."""

    subject: str
    check: str
    problem: str = ""


def check_package(package: str, *, serve: bool = True) -> Iterator[Outcome]:
    """Yields the outcome of every check, as it is known.

    Args:
        package: name of an installed distribution.
        serve: start the engine, too, and compare what it serves.
    Raises:
        NotFoundError: it is not installed, or registers neither a method nor an op.
    """
    try:
        points = distribution(package).entry_points
    except PackageNotFoundError:
        raise NotFoundError(f"package {package!r} is not installed here; install it with pip first") from None
    methods, ops = ([point.name for point in points.select(group=group)] for group in (METHODS_GROUP, OPS_GROUP))
    if not methods and not ops:
        raise NotFoundError(f"package {package!r} has no entry point in {METHODS_GROUP} or {OPS_GROUP}")
    yield from (_outcome(f"op {name}", "loads", lambda n=name: op_class(n)) for name in ops)
    registry = Registry()
    for plugin in methods:
        if plugin in registry.broken:
            yield Outcome(f"plugin {plugin}", "loads", registry.broken[plugin])
            continue
        for method in registry.methods():
            if method.plugin == plugin:
                yield from _check_method(method.name, registry, serve)


def _check_method(name: str, registry: Registry, serve: bool) -> Iterator[Outcome]:
    try:
        own = cases(name, registry=registry)
    except (DeltamuxError, Refused) as error:
        yield Outcome(name, "applies to a base", str(error))
        return
    for title, check in CHECKS.items():
        problems = (_outcome(name, title, lambda c=case, f=check: f(c)).problem for case in own)
        found = [f"{case.architecture}: {problem}" for case, problem in zip(own, problems, strict=True) if problem]
        yield Outcome(name, title, "; ".join(found[:2]))
    if serve:
        yield _outcome(name, "served_as_trained", lambda: check_serving(own, _first(own).architecture))


def _first(own: list[Case]) -> Case:
    if not own:
        raise Refused("the method applies to no base that could be served")
    return own[0]


def _outcome(subject: str, title: str, call: object) -> Outcome:
    assert callable(call)
    try:
        call()
    except (DeltamuxError, Refused) as error:
        return Outcome(subject, title, str(error))
    except Exception as error:
        return Outcome(subject, title, f"{type(error).__name__}: {error}")
    return Outcome(subject, title)

"""Generates the Python stubs of the gRPC contract into ``runtime/deltamux/v1``; ``--check`` only compares them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]  # grpcio-tools ships no types

PROTO = Path(__file__).resolve().parent
RUNTIME = PROTO.parent / "runtime"
PACKAGE = Path("deltamux/v1")
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(root: Path) -> None:
    """Writes messages, services and their types below a source root."""
    sources = sorted(str(path.relative_to(PROTO)) for path in (PROTO / PACKAGE).glob("*.proto"))
    scripts = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"--proto_path={PROTO}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={root}",
        # protoc's own --pyi_out leaves Mapping without arguments, which a strict type checker refuses.
        f"--mypy_out=quiet:{root}",
        f"--grpc_python_out={root}",
        f"--mypy_grpc_out=quiet:{root}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed: see its messages above")


def stubs(root: Path) -> dict[str, bytes]:
    """Returns the generated files below a source root by name."""
    return {path.name: path.read_bytes() for pattern in PATTERNS for path in (root / PACKAGE).glob(pattern)}


def stale() -> list[str]:
    """Returns the names of committed stubs that differ from what the contract gives now."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh, present = stubs(Path(directory)), stubs(RUNTIME)
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed stubs are out of date")
    if not parser.parse_args().check:
        for name in stubs(RUNTIME):
            (RUNTIME / PACKAGE / name).unlink()
        generate(RUNTIME)
    elif names := stale():
        raise SystemExit(f"stubs are out of date, run `make proto`: {', '.join(names)}")


if __name__ == "__main__":
    main()

"""The layers of the code base: imports go one way, vLLM stays in one folder, and importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {ROOT / "runtime": "deltamux", ROOT / "plugins": "deltamux_plugins", ROOT / "trainers": "deltamux_trainers"}
GENERATED = ("_pb2.py", "_pb2_grpc.py")
MAX_LINES = 400

CORE = {"deltamux", "deltamux.adapter_files", "deltamux.child_process", "deltamux.errors", "deltamux.options"}
MODEL = CORE | {"deltamux.deltas"}
METHODS = MODEL | {
    *("deltamux.hookspecs", "deltamux.method", "deltamux.patterns", "deltamux.plugin_manager", "deltamux.registry")
}
WIRE = CORE | {"deltamux.v1"}
V = "deltamux.engine.vllm"
VLLM = MODEL | {"deltamux.engine", V}

# Layer -> the layers that its modules may import. A layer may always import itself.
ALLOWED: dict[str, set[str]] = {
    "deltamux": {"deltamux.hookspecs"},
    "deltamux.adapter_files": set(),
    "deltamux.child_process": set(),
    "deltamux.errors": set(),
    "deltamux.options": {"deltamux.errors"},
    "deltamux.__main__": {"deltamux.cli"},
    "deltamux.deltas": CORE,
    "deltamux.hookspecs": METHODS,
    "deltamux.patterns": CORE,
    "deltamux.configs": CORE | {"deltamux.patterns"},
    "deltamux.plugin_manager": CORE | {"deltamux.hookspecs"},
    "deltamux.method": METHODS | {"deltamux.configs"},
    "deltamux.registry": METHODS,
    "deltamux.prompts": CORE,
    "deltamux.engine": MODEL,
    "deltamux.engine.vllm": MODEL | {"deltamux.engine"},
    "deltamux.engine.vllm.frontend": VLLM | {"deltamux.prompts", f"{V}.grammars", f"{V}.loading"},
    "deltamux.engine.vllm.grammars": VLLM,
    "deltamux.engine.vllm.scheduling": VLLM | {f"{V}.grammars"},
    "deltamux.engine.vllm.loading": VLLM,
    "deltamux.engine.vllm.layers": VLLM,
    "deltamux.engine.vllm.auto_merge": VLLM | {f"{V}.layers", f"{V}.loading"},
    "deltamux.engine.vllm.worker": VLLM | {f"{V}.auto_merge", f"{V}.layers", f"{V}.loading"},
    "deltamux.engine.vllm.cuda": VLLM | {f"{V}.layers", f"{V}.worker"},
    "deltamux.engine.vllm.preload": {"deltamux.child_process", f"{V}.scheduling", f"{V}.worker"},
    "deltamux.conformance": METHODS | {"deltamux.engine"},
    "deltamux.bench": METHODS | {"deltamux.client", "deltamux.engine"},
    "deltamux.scaffold": CORE,
    "deltamux.store": MODEL,
    "deltamux.v1": set(),
    # The server's process never runs a plugin, and so knows neither the registry nor the child that does.
    "deltamux.server": MODEL | WIRE | {"deltamux.engine", "deltamux.store"},
    "deltamux.server.commands": MODEL | {"deltamux.cli", "deltamux.server", "deltamux.store"},
    "deltamux.server.compiling.child": METHODS | {"deltamux.server", "deltamux.store"},
    "deltamux.client": WIRE,
    "deltamux.cli": WIRE | {"deltamux.client"},
    "deltamux_plugins": METHODS,
    "deltamux_trainers": METHODS | {"deltamux_plugins", "deltamux.client", "deltamux.prompts"},
    "deltamux_trainers.commands": CORE | {"deltamux.cli", "deltamux_trainers"},
}

# What may be imported inside a function only: the command that needs a heavy layer, the factory that picks an engine.
ALLOWED_INSIDE_FUNCTIONS: dict[str, set[str]] = {
    # Neither the server nor the trainers: their commands register themselves (`deltamux.commands`).
    "deltamux.cli": METHODS | {"deltamux.bench", "deltamux.conformance", "deltamux.engine", "deltamux.scaffold"},
    "deltamux.engine": {"deltamux.engine.vllm.frontend"},
    "deltamux.bench": {"deltamux.engine.vllm.frontend"},
    "deltamux.conformance": {"deltamux.engine.vllm.frontend"},
    "deltamux.server": {V, f"{V}.frontend"},
}


class Import(NamedTuple):
    """One imported module, and where: ``deferred`` means inside a function."""

    path: Path
    line: int
    module: str
    deferred: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def module_name(path: Path) -> str:
    root = next(root for root in SOURCES if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EXAMPLES = ROOT / "plugins" / "examples"  # packages of their own
FILES = sorted(
    path
    for root in SOURCES
    for path in root.rglob("*.py")
    if not path.name.endswith(GENERATED) and not path.is_relative_to(EXAMPLES)
)
MODULES = {module_name(path) for path in FILES}
STUBS = {module_name(p) for root in SOURCES for p in root.rglob("*_pb2*.py")}


def layer(module: str) -> str:
    """Returns the longest layer name that the module lies in."""
    return max((name for name in ALLOWED if f"{module}.".startswith(f"{name}.")), key=len)


def imports(path: Path) -> Iterator[Import]:
    """Yields all imports of a file; ``from package import submodule`` names the submodule."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while stack:
        node, deferred = stack.pop()
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                module = submodule if submodule in MODULES | STUBS else source
                yield Import(path, node.lineno, module, deferred)


IMPORTS = [found for path in FILES for found in imports(path)]


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in SOURCES.values()


def is_allowed(found: Import) -> bool:
    importer, imported = layer(module_name(found.path)), layer(found.module)
    allowed = {importer} | ALLOWED[importer]
    return imported in (allowed | ALLOWED_INSIDE_FUNCTIONS.get(importer, set()) if found.deferred else allowed)


def test_imports_between_layers_go_one_way() -> None:
    wrong = [str(found) for found in IMPORTS if is_ours(found.module) and not is_allowed(found)]
    assert not wrong, "\n".join(["an import that the layers do not allow:", *wrong])


def test_the_layer_check_finds_imports_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "deltamux" / "deltas" / "wrong.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from ..engine import base\nfrom deltamux import registry\nimport deltamux.store as s\n"
        "def f() -> None:\n    from deltamux.server import main\n"
    )
    monkeypatch.setitem(SOURCES, tmp_path, "deltamux")
    found = list(imports(module))
    assert sorted(layer(i.module) for i in found) == [
        "deltamux.engine", "deltamux.registry", "deltamux.server", "deltamux.store"
    ]  # fmt: skip
    assert not any(is_allowed(i) for i in found)
    assert [i.deferred for i in found if i.module.startswith("deltamux.server")] == [True]


def test_vllm_is_imported_in_one_folder_alone() -> None:
    users = [found for found in IMPORTS if found.module.partition(".")[0] == "vllm"]
    wrong = [str(found) for found in users if not layer(module_name(found.path)).startswith("deltamux.engine.vllm")]
    assert not wrong, "\n".join(["vLLM is imported outside runtime/deltamux/engine/vllm:", *wrong])


def test_the_runtime_never_names_a_plugin() -> None:
    for path in FILES:
        if path.is_relative_to(ROOT / "runtime"):
            assert "deltamux_plugins" not in path.read_text(encoding="utf-8"), f"{path} names a plugin"


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    tests = [p for p in (ROOT / "tests").rglob("*.py") if not p.name.endswith(GENERATED)]
    long = [path for path in [*FILES, *tests] if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    assert not long


def loaded_after(statement: str) -> set[str]:
    """Returns the names of all modules that a fresh interpreter has loaded after the statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["deltamux", "deltamux.errors", "deltamux.client", "deltamux.cli", "deltamux.prompts"]
)
def test_importing_the_client_side_loads_neither_torch_nor_vllm_nor_a_server(module: str) -> None:
    heavy = {"torch", "transformers", "vllm", "numpy", "grpc._server", "deltamux.server", "deltamux.engine"}
    assert not loaded_after(f"import {module}") & heavy


@pytest.mark.slow
def test_the_server_loads_no_plugin_and_nothing_that_could() -> None:
    loaded = loaded_after("import deltamux.server.app")
    assert not loaded & {"pluggy", "deltamux.registry", "deltamux.hookspecs", "deltamux_plugins"}


@pytest.mark.slow
def test_importing_the_methods_and_the_deltas_loads_neither_vllm_nor_grpc() -> None:
    loaded = loaded_after("import deltamux.deltas, deltamux.registry\ndeltamux.registry.Registry()")
    assert not loaded & {"vllm", "grpc", "deltamux.engine", "deltamux.server"}


@pytest.mark.slow
def test_a_file_of_an_invented_type_is_refused_without_an_import_of_peft() -> None:
    loaded = loaded_after(
        "import contextlib, deltamux.deltas, deltamux.errors, deltamux.registry\n"
        "with contextlib.suppress(deltamux.errors.UnknownMethodError):\n"
        "    file = deltamux.deltas.Checkpoint({'peft_type': 'XYZ'}, {})\n"
        "    raise AssertionError(deltamux.registry.Registry().recognise(file))"
    )
    assert "deltamux_plugins.bridge" in loaded
    assert "peft" not in loaded

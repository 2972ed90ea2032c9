"""What a server is started with: each option has its range, and what cannot work is told before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltamux.cli import main
from deltamux.engine.base import Engine, EngineOptions
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.server.app import running
from deltamux.server.compiler import Compiler
from deltamux.server.options import CHOICES, RANGES, ServeOptions
from server.conftest import engine_for, options
from server.test_server import write_certificate

FREE = {"model", "store", "listen", "engine_arguments", "admin_key_file", "tls_cert", "tls_key"}
FLAGS = {field.name for field in dataclasses.fields(ServeOptions) if field.type == "bool"}


def made(**given: Any) -> ServeOptions:
    return ServeOptions(**{"model": "base", "store": Path("store"), **given})


def test_each_option_has_a_range_or_its_words_or_is_free() -> None:
    assert {*RANGES, *CHOICES, *FLAGS, *FREE} == {field.name for field in dataclasses.fields(ServeOptions)}


@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range_is_refused_with_the_range(name: str) -> None:
    low, high = RANGES[name]
    wrong: list[Any] = [math.nan, math.inf, -math.inf, -1, low - 1, high + 1, True, "8", [8]]
    wrong += [1.5] if RANGES[name].whole else []
    wrong += [None] if ServeOptions.__dataclass_fields__[name].default is not None else []
    for value in wrong:
        with pytest.raises(InvalidConfigError, match=f"{name} must be a (whole )?number from .* to ") as refused:
            made(**{name: value})
        assert refused.value.metadata == {"field": name}
    for value in (low, high, ServeOptions.__dataclass_fields__[name].default):
        assert getattr(made(**{name: value}), name) == value


@pytest.mark.parametrize("name", CHOICES)
def test_a_word_that_an_option_does_not_have_is_refused_with_those_it_has(name: str) -> None:
    for value in ("int3", "", None, 1, CHOICES[name][0].upper()):
        with pytest.raises(InvalidConfigError, match=", ".join(CHOICES[name])):
            made(**{name: value})
    for value in CHOICES[name]:
        made(**{name: value})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"model": ""}, "model"),
        ({"listen": ""}, "listen"),
        ({"listen": "localhost"}, "listen"),
        ({"listen": ":8470"}, "listen"),
        ({"listen": "127.0.0.1:65536"}, "listen"),
        ({"listen": "127.0.0.1:-1"}, "listen"),
        ({"listen": "127.0.0.1:" + "9" * 5000}, "listen"),
        ({"listen": "unix:"}, "listen"),
        ({"tls_cert": Path("cert.pem")}, "tls_cert"),
        ({"tls_key": Path("key.pem")}, "tls_cert"),
    ],
)
def test_what_cannot_be_listened_to_or_loaded_is_refused_by_its_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfigError) as refused:
        made(**given)
    assert refused.value.metadata == {"field": field}


@pytest.mark.parametrize(
    "given",
    [
        ("--drain-seconds", "-5"),
        ("--drain-seconds", "nan"),
        ("--kv-cache-gib", "-1"),
        ("--dtype", "int3"),
        ("--device", "tpu"),
        ("--max-model-len", "0"),
        ("--upload-idle-seconds", "inf"),
    ],
)
def test_the_command_refuses_a_value_out_of_range(
    given: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "base", "--store", str(tmp_path / "store"), *given]) == 1
    assert f"option {given[0].removeprefix('--').replace('-', '_')} must be" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def never(_: EngineOptions) -> Engine:
    raise AssertionError("the engine is made before the address and the TLS files are known to be good")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_certificate(tmp_path)


def encrypted(cert: Path, key: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    pem = serialization.Encoding.PEM
    key.write_bytes(loaded.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))


def of_another(cert: Path, key: Path) -> None:
    (cert.parent / "other").mkdir()
    key.write_bytes(write_certificate(cert.parent / "other")[1].read_bytes())


def damaged(cert: Path, key: Path) -> None:
    lines = cert.read_text().splitlines()
    cert.write_text("\n".join([lines[0], lines[1][:20], lines[-1]]))


def a_folder(cert: Path, key: Path) -> None:
    key.unlink()
    key.mkdir()


TLS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no certificate": (lambda cert, key: cert.unlink(), r"cert\.pem cannot be read: No such file"),
    "no key": (lambda cert, key: key.unlink(), r"key\.pem cannot be read: No such file"),
    "a folder": (a_folder, r"key\.pem cannot be read: Is a directory"),
    "a certificate that is something else": (lambda cert, key: cert.write_text("x"), r"cert\.pem holds no certificate"),
    "a key that is something else": (lambda cert, key: key.write_bytes(b"\x00"), r"key\.pem holds no private key"),
    "the two exchanged": (lambda cert, key: cert.write_bytes(key.read_bytes()), r"cert\.pem holds no certificate"),
    "a damaged certificate": (damaged, r"cert\.pem holds a damaged certificate"),
    "an encrypted key": (encrypted, r"key\.pem is encrypted"),
    "another certificate's key": (of_another, r"key\.pem is not the key of the certificate in .*cert\.pem"),
}


@pytest.mark.parametrize("case", TLS)
async def test_a_mistake_in_the_tls_files_is_told_as_such_before_the_engine_is_made(
    case: str, pair: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    spoil, problem = TLS[case]
    spoil(*pair)
    given = options(tiny_base, tmp_path / "store", tls_cert=pair[0], tls_key=pair[1])
    with pytest.raises(FailedPreconditionError, match=problem) as refused:
        async with running(given, never):
            pass
    assert refused.value.reason == "TLS_FILES"


async def test_an_address_that_is_taken_is_told_before_the_engine_is_made(
    tiny_base: Path, tmp_path: Path, shared_compiler: Compiler
) -> None:
    first = options(tiny_base, tmp_path / "store")
    async with running(first, lambda _: engine_for(tiny_base), shared_compiler) as server:
        second = dataclasses.replace(first, store=tmp_path / "other", listen=server.address)
        with pytest.raises(FailedPreconditionError, match="cannot listen on") as refused:
            async with running(second, never, shared_compiler):
                pass
    assert refused.value.reason == "ADDRESS_UNAVAILABLE"

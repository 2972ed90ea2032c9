"""The options of a server: each has its range, and invalid ones are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltamux.cli import main
from deltamux.engine.base import Engine, EngineOptions
from deltamux.errors import DeltamuxError, FailedPreconditionError, InvalidConfigError
from deltamux.options import declared
from deltamux.server.options import ServeOptions
from deltamux_testing.certificates import write_certificate
from deltamux_testing.servers import Servers

OPTIONS = declared(ServeOptions)
RANGES = {name: each.option.allowed for name, each in OPTIONS.items() if each.option.allowed}
CHOICES = {name: each.option.choices for name, each in OPTIONS.items() if each.option.choices}
FLAGS = {name for name, each in OPTIONS.items() if each.kind is bool}
FREE = {"model", "store", "listen", "admin_key_file", "tls_cert", "tls_key"}


def made(**given: Any) -> ServeOptions:
    return ServeOptions(**{"model": "base", "store": Path("store"), **given})


def test_each_option_has_a_range_or_its_words_or_is_free() -> None:
    assert {*RANGES, *CHOICES, *FLAGS, *FREE} == set(OPTIONS)
    undeclared = {field.name for field in dataclasses.fields(ServeOptions)} - set(OPTIONS)
    assert undeclared == {"engine_arguments", "seed", "warm_grammars"}


def test_the_engine_gets_what_the_server_was_given() -> None:
    given = made(max_num_seqs=7, dtype="bfloat16", engine_arguments={"block_size": 32}).engine_options()
    assert given == EngineOptions(
        "base", max_num_seqs=7, dtype="bfloat16", engine_arguments={"block_size": 32}, warm_grammars=True
    )


@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range_is_refused_with_the_range(name: str) -> None:
    low, high, *_ = RANGES[name]
    wrong: list[Any] = [math.nan, math.inf, -math.inf, -1, low - 1, high + 1, True, "8", [8]]
    wrong += [1.5] if RANGES[name].whole else []
    wrong += [None] if ServeOptions.__dataclass_fields__[name].default is not None else []
    for value in wrong:
        with pytest.raises(InvalidConfigError, match=f"{name} must be a (whole )?number from .* to ") as refused:
            made(**{name: value})
        assert refused.value.metadata == {"field": name}
    for value in (low, high, ServeOptions.__dataclass_fields__[name].default):
        assert getattr(made(**{name: value}), name) == value


def test_a_context_that_holds_a_prompt_and_no_new_token_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="max_model_len must be a whole number from 2 to "):
        made(max_model_len=1)


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
    raise AssertionError("the engine is made before the options are known to be good")


async def refusal(serve: Servers, match: str, **given: Any) -> DeltamuxError:
    """Returns the error with which a server is refused before its engine is made."""
    with pytest.raises((FailedPreconditionError, InvalidConfigError), match=match) as refused:
        async with serve(never, **given):
            pass
    return refused.value


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
    "an expired certificate": (lambda cert, key: write_certificate(cert.parent, days=-5), "certificate has expired"),
    "a certificate of tomorrow": (lambda cert, key: write_certificate(cert.parent, days=5), "is not yet valid"),
    "a curve that clients refuse": (lambda cert, key: write_certificate(cert.parent, "SECP521R1"), "ECDSA on P-521"),
    "a key that clients refuse": (lambda cert, key: write_certificate(cert.parent, "Ed25519"), "is of Ed25519"),
    "a curve that gRPC does not know": (
        lambda cert, key: write_certificate(cert.parent, "SECP256K1"),
        "cannot be read by gRPC: it takes",
    ),
    "a byte-order mark": (
        lambda cert, key: cert.write_bytes(b"\xef\xbb\xbf" + cert.read_bytes()),
        "cannot be read by gRPC: it takes PEM without a byte-order mark",
    ),
    "another certificate's key": (of_another, r"key\.pem is not the key of the certificate in .*cert\.pem"),
}


@pytest.mark.parametrize("case", TLS)
async def test_an_error_in_the_tls_files_is_raised_before_the_engine_is_made(
    case: str, pair: tuple[Path, Path], serve: Servers
) -> None:
    spoil, problem = TLS[case]
    spoil(*pair)
    assert (await refusal(serve, problem, tls_cert=pair[0], tls_key=pair[1])).reason == "TLS_FILES"


async def test_a_taken_address_is_refused_before_the_engine_is_made(serve: Servers, tmp_path: Path) -> None:
    async with serve() as server:
        refused = await refusal(serve, "cannot listen on", store=tmp_path / "other", listen=server.address)
    assert refused.reason == "ADDRESS_UNAVAILABLE"


async def test_a_unix_socket_that_a_server_listens_on_is_not_taken_from_it(serve: Servers, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'socket'}"
    async with serve(listen=listen) as server:
        await refusal(serve, "another process listens there", store=tmp_path / "other", listen=listen)
        async with server.client() as client:
            assert await client.list_tenants() == []
    (tmp_path / "socket").unlink(missing_ok=True)


ADDRESSES = {
    "unix:{tmp}/nowhere/socket": "No such file or directory",
    "127.0.0.1:{taken}": "Address already in use",
    "192.0.2.1:0": "Cannot assign requested address",
}


@pytest.mark.parametrize("listen", ADDRESSES)
async def test_an_unavailable_address_is_refused_with_the_systems_error(
    listen: str, serve: Servers, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = listen.format(tmp=tmp_path, taken=other.getsockname()[1])
        await refusal(serve, f"cannot listen on .*: {ADDRESSES[listen]}; choose", listen=address, insecure=True)


KEY_FILES: dict[str, Callable[[Path], Any]] = {
    "an empty file": lambda file: file.write_text(""),
    "a file of spaces": lambda file: file.write_text(" \n\n"),
    "two lines": lambda file: file.write_text("dmx_admin_one\ndmx_admin_two\n"),
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\x00key"),
    "what no call can carry": lambda file: file.write_text("k" * 10_000),
    "a folder": lambda file: file.mkdir(),
    "a folder that is not there": lambda file: None,
}


@pytest.mark.parametrize("case", KEY_FILES)
async def test_a_key_file_without_one_key_is_refused_before_the_engine_is_made(
    case: str, serve: Servers, tmp_path: Path
) -> None:
    file = tmp_path / ("nowhere/admin.key" if case == "a folder that is not there" else "admin.key")
    KEY_FILES[case](file)
    refused = await refusal(serve, "administrator's key file .* repair it", auth="keys", admin_key_file=file)
    assert refused.reason == "ADMIN_KEY"


@pytest.mark.parametrize("store", ["file", "file/store", "link", "n" * 300])
def test_a_store_that_cannot_be_made_is_refused_in_a_sentence(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("link")
    assert main(["serve", "--model", "base", "--store", str(tmp_path / store)]) == 1
    assert "cannot be a store: " in capsys.readouterr().err


REFUSED_AT_ONCE: dict[str, dict[str, Any]] = {
    "'nosuch' is not an argument": {"engine_arguments": {"nosuch": 1}},
    "'model' is what deltamux sets itself": {"engine_arguments": {"model": "other"}},
    "'enable_lora' is what deltamux sets itself": {"engine_arguments": {"enable_lora": False}},
    "'additional_config' must be a JSON object": {"engine_arguments": {"additional_config": "x"}},
    "kv_cache_gib is 65536; this machine has .* in all": {"kv_cache_gib": 65536.0},
    "max_model_len is 513; the base model .* has a context of 512 tokens": {"max_model_len": 513},
}


@pytest.mark.parametrize("problem", REFUSED_AT_ONCE)
async def test_what_vllm_would_refuse_later_is_refused_before_the_store_is_made(problem: str, serve: Servers) -> None:
    refused = await refusal(serve, problem, **REFUSED_AT_ONCE[problem])
    assert isinstance(refused, InvalidConfigError)
    assert "\n" not in refused.message
    assert not serve.store.exists()


@pytest.mark.parametrize(
    "listen", ["::1:8470", "[::1:8470", "::1]:8470", "[]:8470", "[::1]", "[[::1]]:1", ":1", "a:b:1"]
)
def test_an_address_of_ipv6_is_written_in_brackets(listen: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"such as 127.0.0.1:8470 or \[::1\]:8470"):
        made(listen=listen)
    assert made(listen="[::1]:8470").listen == "[::1]:8470"

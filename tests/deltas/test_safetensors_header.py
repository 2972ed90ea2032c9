"""Headers of safetensors files: refused within milliseconds and kilobytes, or accepted, and then safetensors agrees."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from deltamux.deltas import Checkpoint
from deltamux.deltas.bounded_json import Bounds, JSONRefusedError, parse_object
from deltamux.deltas.safetensors_header import BITS, MAX_TENSORS, read_header
from deltamux.errors import InvalidAdapterError

MAX_SECONDS = 5.0


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def one(**given: Any) -> bytes:
    return f'{{"ok":{entry()},"bad":{entry(**{"offsets": (4, 8)} | given)}}}'.encode()


def raw(shape: str, offsets: str = "[4,8]") -> bytes:
    return f'{{"ok":{entry()},"bad":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()


BOMBS: dict[str, bytes] = {
    "a shape with text": one(shape=["a", 500_000_000]),
    "a shape with a list": one(shape=[[0], 30_000_000]),
    "500 dimensions of 4,000 digits": raw(f"[{','.join(['9' * 4000] * 500)}]"),
    "a thousand dimensions": one(shape=[1] * 1000),
    "huge dimensions and a zero": one(shape=[0, 1 << 47, 1 << 47], offsets=(4, 4)),
    "10,000 deep": raw("[" * 10_000),
    "10,000 objects deep": b'{"bad":' + b'{"a":' * 10_000,
    "a key twice in an entry": raw('[1],"shape":[1]'),
    "a tensor twice": f'{{"bad":{entry()},"bad":{entry()}}}'.encode(),
    "offsets that overlap": one(offsets=(2, 6)),
    "offsets with a gap": one(offsets=(5, 9)),
    "offsets that end before they begin": one(offsets=(8, 4)),
    "one offset": one(offsets=(4,)),
    "fractional offsets": one(offsets=(4.0, 8.0)),
    "negative offsets": one(offsets=(-4, 0)),
    "an offset that is true": one(offsets=(True, 5)),
    "an offset of 1e400": raw("[1]", "[4,1e400]"),
    "an offset of -0": raw("[0]", "[-0,-0]"),
    "NaN": raw("[NaN]"),
    "a dtype that is not text": one(dtype=["F32"]),
    "a dtype that does not exist": one(dtype="F33"),
    "a dtype of another size": one(dtype="F64"),
    "a missing field": b'{"bad":{"dtype":"F32","shape":[1]}}',
    "a field too many": raw('[1],"more":1'),
    "an entry that is a list": b'{"bad":[]}',
    "a name of 600 bytes": json.dumps({"bad" * 200: json.loads(entry())}).encode(),
}
WHOLE: dict[str, bytes] = {
    "no object": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"\xff":1}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "half of a surrogate pair": b'{"\\ud800":{}}',
    "an unterminated string of escapes": b'{"' + b'\\"' * 500_000,
    "a million values": b"{" + b'"":1,' * 900_000 + b'"":1}',
    "a million arrays": b'{"a":[' + b"[]," * 900_000 + b"[]]}",
    "metadata that are not text": b'{"__metadata__":{"a":[]}}',
    "metadata that are a list": b'{"__metadata__":[]}',
}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, bytes], Path]:
    """Returns what writes a safetensors file of a header and data."""
    path = tmp_path_factory.mktemp("headers") / "adapter_model.safetensors"

    def write(header: bytes, data: bytes = bytes(8)) -> Path:
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)
        return path

    return write


def refusal(path: Path) -> InvalidAdapterError:
    """Returns the error that a header is refused with, which must take little time to find."""
    began = time.process_time()
    with pytest.raises(InvalidAdapterError) as refused:
        read_header(path)
    assert time.process_time() - began < MAX_SECONDS
    return refused.value


@contextmanager
def little_memory(path: Path) -> Iterator[None]:
    """Demands that the block takes memory for a few copies of a file at most."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20) + 6 * path.stat().st_size


@pytest.mark.parametrize("case", BOMBS)
def test_a_bad_entry_is_refused_at_once_by_its_name(case: str, write: Callable[..., Path]) -> None:
    path = write(BOMBS[case])
    with little_memory(path):
        refused = refusal(path)
    assert refused.reason == "DAMAGED_FILE"
    assert refused.metadata["tensor"].startswith("bad")
    assert "bad" in refused.message


@pytest.mark.parametrize("case", WHOLE)
def test_a_damaged_header_is_refused_at_once(case: str, write: Callable[..., Path]) -> None:
    assert refusal(write(WHOLE[case])).reason == "DAMAGED_FILE"


def test_more_tensors_than_the_bound_are_refused(write: Callable[..., Path]) -> None:
    names = (f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(MAX_TENSORS + 1))
    refused = refusal(write(f"{{{','.join(names)}}}".encode(), b""))
    assert f"{MAX_TENSORS + 1} tensors" in refused.message


@pytest.mark.parametrize(
    ("length", "size", "reason"),
    [
        (10_000_000_000, 8, "DAMAGED_FILE"),
        ((1 << 64) - 1, 8, "DAMAGED_FILE"),
        ((16 << 20) + 1, 32 << 20, "DAMAGED_FILE"),
    ],
)
def test_a_header_longer_than_the_file_or_the_bound_is_not_read(
    length: int, size: int, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(size)
    assert refusal(path).reason == reason


@pytest.mark.parametrize("dtype", ["F8_E8M0", "C64", "I8", "U16", "F4"])
def test_a_known_dtype_that_adapters_do_not_hold_is_refused_by_its_name_and_not_as_damage(
    dtype: str, write: Callable[..., Path]
) -> None:
    size = 2 * BITS[dtype] // 8
    path = write(f'{{"bad":{entry((2,), (0, size), dtype)}}}'.encode(), bytes(size))
    (path.parent / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InvalidAdapterError, match=f"'bad' has dtype {dtype}: .*; adapters hold float32") as refused:
        Checkpoint.read(path.parent)
    assert refused.value.metadata == {"tensor": "bad", "dtype": dtype}


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 1 << 70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 4), max_size=10),
    st.sampled_from(sorted(BITS)),
)


@st.composite
def valid(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that is as it should be, and the number of bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    begin = 0
    for name in draw(st.lists(st.text(max_size=8), max_size=4, unique=True)):
        dtype = draw(st.sampled_from([name for name, bits in BITS.items() if bits % 8 == 0]))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        size = BITS[dtype] // 8
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    return header, begin


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A valid header in which values, and then bytes, may have been replaced."""
    header, size = draw(valid())
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        entry = draw(st.sampled_from(entries))
        key = draw(st.sampled_from(sorted(entry)))
        if isinstance(entry[key], list) and entry[key] and draw(st.booleans()):
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(LEAVES)
        else:
            entry[key] = draw(LEAVES)
    text = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(text), bytes(max(0, size + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))))


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@example((b'{"t":{"dtype":"F32","shape":["a",200000000],"data_offsets":[0,4]}}', bytes(4)))
@example((b'{"t":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}', bytes(1)))
@given(spoilt())
def test_what_is_accepted_safetensors_reads_alike_and_the_rest_is_refused_within_bounds(
    write: Callable[..., Path], made: tuple[bytes, bytes]
) -> None:
    path = write(*made)
    began = time.process_time()
    try:
        header = read_header(path)
    except InvalidAdapterError:
        assert time.process_time() - began < MAX_SECONDS
        return
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == sorted(tensor.name for tensor in header.tensors)
        assert (file.metadata() or {}) == header.metadata
        for tensor in header.tensors:
            assert tuple(file.get_slice(tensor.name).get_shape()) == tensor.shape
            assert file.get_slice(tensor.name).get_dtype() == tensor.dtype


@settings(max_examples=100)
@given(valid())
def test_a_header_as_it_should_be_is_accepted(write: Callable[..., Path], made: tuple[dict[str, Any], int]) -> None:
    header, size = made
    assert len(read_header(write(json.dumps(header).encode(), bytes(size))).tensors) == len(header) - (
        "__metadata__" in header
    )


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickles_first_bytes_is_accepted(
    length: int, write: Callable[..., Path]
) -> None:
    header = f'{{"ok":{entry()}}}'.encode().ljust(length)
    assert [tensor.name for tensor in read_header(write(header, bytes(4))).tensors] == ["ok"]


CONFIGS: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"r": 4, "r": 8}', "'r' occurs twice"),
    "a key twice further in": (b'{"rank_pattern": {"a": 4, "a": 8}}', "'a' occurs twice.*rank_pattern"),
    "nested 10,000 deep": (b'{"r":' + b"[" * 10_000, "nested.*'r'"),
    "a number of 5,000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "5000 characters.*'r'"),
    "a number that no float holds": (b'{"r": 1e400}', "1e400"),
    "NaN": (b'{"lora_alpha": NaN}', "NaN, which is not valid JSON"),
    "a million values": (b'{"r": [' + b"1," * 500_000 + b"1]}", "more than 100000 values"),
    "two megabytes": (b'{"r": "' + b"x" * (2 << 20) + b'"}', "larger than"),
    "half of a surrogate pair": (b'{"r": "\\ud800"}', "surrogate"),
    "a list": (b"[]", "not a JSON object"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_beyond_its_bounds_is_refused_with_its_entry(case: str, write: Callable[..., Path]) -> None:
    text, problem = CONFIGS[case]
    path = write(b"{}", b"")
    (path.parent / "adapter_config.json").write_bytes(text)
    with pytest.raises(InvalidAdapterError, match=problem) as refused:
        Checkpoint.read(path.parent)
    assert refused.value.metadata["file"] == "adapter_config.json"


def test_a_byte_order_mark_before_a_config_is_skipped(write: Callable[..., Path]) -> None:
    path = write(b"{}", b"")
    (path.parent / "adapter_config.json").write_bytes(b'\xef\xbb\xbf{"peft_type": "LORA"}')
    assert Checkpoint.read(path.parent).config == {"peft_type": "LORA"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.integers(2, 5))
def test_an_object_is_read_as_json_reads_it_or_is_deeper_than_its_bound(values: dict[str, Any], depth: int) -> None:
    text = json.dumps(values)
    try:
        assert parse_object(text.encode(), Bounds(depth=depth, values=1000)) == json.loads(text)
    except JSONRefusedError:
        assert "Infinity" in text or depth_of(values) > depth


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)

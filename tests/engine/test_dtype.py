"""Where no dtype is asked for, a base runs in the one that its processor is fast at."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from deltamux.deltas import BaseSupport
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.frontend import dtype
from deltamux.engine.vllm.frontend.dtype import choose

X86 = "processor : 0\nflags : fpu avx2 {}\n"
ARM = "processor : 0\nFeatures : fp asimd {}\n"


def base(folder: Path, stored: str = "bfloat16", **options: Any) -> Path:
    LlamaConfig(dtype=stored, **options).save_pretrained(folder)
    return folder


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dtype, "CPU_INFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (X86.format(""), "float32"),
        (X86.format("avx512_bf16"), "auto"),
        (X86.format("amx_bf16"), "auto"),
        (ARM.format("bf16"), "auto"),
        (ARM.format(""), "float32"),
        ("", "float32"),
    ],
)
def test_a_processor_without_bfloat16_runs_float32(cpu: Path, tmp_path: Path, info: str, name: str) -> None:
    cpu.write_text(info)
    chosen = choose(EngineOptions(str(base(tmp_path))), 1000, "cpu")
    assert chosen.name == name
    assert "instructions for" in chosen.reason


def test_float32_that_does_not_fit_into_memory_is_not_taken(cpu: Path, tmp_path: Path) -> None:
    cpu.write_text(X86.format(""))
    chosen = choose(EngineOptions(str(base(tmp_path))), 10**13, "cpu")
    assert chosen.name == "auto"
    assert "takes 37256.9 GiB of" in chosen.reason


@pytest.mark.parametrize(
    ("device", "options", "config"),
    [
        ("cuda", {}, {}),
        ("cpu", {"dtype": "bfloat16"}, {}),
        ("cpu", {}, {"quantization_config": {"quant_method": "fp8"}}),
    ],
    ids=["a GPU", "asked for", "quantised"],
)
def test_elsewhere_nothing_is_changed(
    cpu: Path, tmp_path: Path, device: str, options: dict[str, str], config: dict[str, object]
) -> None:
    cpu.write_text(X86.format(""))
    given = EngineOptions(str(base(tmp_path, **config)), **options)  # type: ignore[arg-type]  # one of its fields
    assert choose(given, 1000, device).name == given.dtype


def test_what_a_base_takes_is_said_in_a_line_per_reason() -> None:
    support = BaseSupport(
        frozenset({("linear", "a"), ("linear", "b"), ("norm", "n")}),
        {("attention", "x"): "no", ("attention", "y"): "no", ("linear", "c"): "other"},
        dtype="float32",
        dtype_reason="as asked for",
    )
    assert support.lines() == [
        "weights in float32: as asked for",
        "takes deltas at 2 linear, 1 norm sites",
        "takes none at 2 attention sites: no",
        "takes none at 1 linear site: other",
    ]

"""Bases that transformers and vLLM would read differently, or with memory in place of weights, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bases.configs import BASES, save_base
from deltamux.deltas import BaseModel
from deltamux.errors import FailedPreconditionError

FILE = "model.safetensors"


def without(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        tensors = load_file(base / FILE)
        del tensors[name]
        save_file(tensors, base / FILE, metadata={"format": "pt"})

    return change


def with_config(**values: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config | values), encoding="utf-8")

    return change


def with_older_shards(base: Path) -> None:
    tensors = load_file(base / FILE)
    shard = "model-00001-of-00001.safetensors"
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, base / shard, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (base / f"{FILE}.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("lm_head.weight"), r"lack lm_head\.weight"),
        (without("model.layers.1.self_attn.q_proj.weight"), r"lack model\.layers\.1\.self_attn\.q_proj\.weight"),
        (without("model.layers.1.self_attn.q_proj.bias"), r"lack model\.layers\.1\.self_attn\.q_proj\.bias"),
        (without("model.norm.weight"), r"lack model\.norm\.weight"),
        (with_config(vocab_size=300), r"\(256, 64\), and config\.json says \(300, 64\)"),
        (with_config(architectures=["LlamaForCausalLM"]), "names LlamaForCausalLM in architectures"),
        (with_older_shards, "both model.safetensors and an index of other files"),
    ],
)
def test_a_damaged_or_contradictory_base_is_refused_with_the_reason(
    change: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    BaseModel.from_pretrained(base)
    change(base)
    with pytest.raises(FailedPreconditionError, match=reason) as refused:
        BaseModel.from_pretrained(base)
    assert refused.value.reason == ("BASE_INCOMPLETE" if "lack" in reason else "BASE_DAMAGED")


@pytest.mark.slow
def test_bases_as_transformers_writes_them_are_whole(tmp_path: Path) -> None:
    for name in BASES:
        BaseModel.from_pretrained(save_base(tmp_path / name, name))
        shutil.rmtree(tmp_path / name)


def test_code_that_a_base_brings_is_neither_run_nor_asked_for_on_the_terminal(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    with_config(auto_map=code)(base)
    BaseModel.from_pretrained(base)  # transformers has its type
    with_config(model_type="own")(base)
    (base / "configuration_own.py").write_text("raise SystemExit(1)", encoding="utf-8")
    with pytest.raises(FailedPreconditionError, match="brings code of its own") as refused:
        BaseModel.from_pretrained(base)
    assert refused.value.reason == "UNSUPPORTED_BASE"

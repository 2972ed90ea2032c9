"""The files that a merge writes, and the error that it reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltamux.cli import main
from deltamux.conformance.bases import save_base
from deltamux.deltas import BaseModel
from deltamux.errors import FailedPreconditionError, InvalidAdapterError, InvalidArgumentError, NotMergeableError
from deltamux_testing import training
from deltamux_testing.adapters import write_own
from deltamux_trainers import convert, merge
from deltamux_trainers.commands import ended_by_sigterm
from deltamux_trainers.output_dir import atomic_output
from deltamux_trainers.tools.merge import PROBE_LENGTH, PROBE_ROWS

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.fixture
def base(tmp_path: Path, directory: Path) -> Path:
    """A copy of the base, to be changed."""
    shutil.copytree(directory, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def adapter(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own("lora", BaseModel.from_pretrained(directory), tmp_path_factory.mktemp("adapter"), r=4)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


def shard(base: Path, size: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=size)


def weights_of(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if "writing" in path.name or path == output)


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """Returns the logits of the tokens that a merge compares."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = BaseModel.from_pretrained(base).embedding.vocab_size
    return training.logits(base, adapter, torch.randint(vocab_size, (PROBE_ROWS, PROBE_LENGTH), generator=generator))


def test_files_that_are_not_weights_are_copied_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Also a generation config that transformers refuses to write; weights in other forms would be another model's."""
    change(base / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False)
    (base / "README.md").write_text("a model\r\n")
    (base / "extra").mkdir()
    (base / "extra" / "notes.txt").write_bytes(b"\x00\xff")
    for stale in ("pytorch_model.bin", "consolidated.safetensors", "extra/model.gguf", ".cached"):
        (base / stale).write_bytes(b"stale")
    merge(str(base), adapter, tmp_path / "merged")
    copied = {p.relative_to(base) for p in base.rglob("*") if p.is_file() and p.suffix not in (".bin", ".gguf")}
    copied -= {Path("consolidated.safetensors"), Path(".cached")}
    assert {p.relative_to(tmp_path / "merged") for p in (tmp_path / "merged").rglob("*") if p.is_file()} == copied
    for file in copied - {Path("model.safetensors")}:
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes(), file


def test_a_base_without_tokenizer_files_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in base.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    result = merge(str(base), adapter, tmp_path / "merged")
    assert result.logit_error is not None
    assert result.logit_error < 1e-4
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base_is_refused_with_what_to_do(method: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    change(base / "config.json", quantization_config=QUANTISED[method])
    with pytest.raises(FailedPreconditionError, match=rf"quantised \({method}\).* merge into the model"):
        merge(str(base), adapter, tmp_path / "merged")
    assert left(tmp_path / "merged") == []


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", "[" * 100_000, "\udcff"], ids=lambda content: repr(content)[:8]
)
def test_a_base_whose_config_is_missing_or_damaged_is_refused_by_its_name(
    content: str | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FailedPreconditionError, match=r"config\.json, of the base model, is") as refused:
        merge(str(copy), adapter, tmp_path / "merged")
    assert refused.value.reason == "BASE_DAMAGED"
    assert not (tmp_path / "merged").exists()


def test_a_base_that_is_only_a_pickle_is_refused_with_what_to_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(FailedPreconditionError, match=r"no model\.safetensors; save the base with"):
        merge(str(base), adapter, tmp_path / "merged")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_reported_error_is_that_of_the_written_file(
    dtype: str, stored: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    if stored == "bfloat16":
        tensors = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        change(base / "config.json", dtype="bfloat16")
    result = merge(str(base), adapter, tmp_path / "merged", dtype=dtype)
    written = stored if dtype == "auto" else dtype
    files = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in files.values()} == {f"torch.{written}"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == getattr(torch, written)
    difference = float((logits(tmp_path / "merged") - logits(base, adapter)).abs().max())
    assert result.logit_error == pytest.approx(difference, rel=1e-3, abs=1e-6)
    exact = written == "float32"
    assert (result.error < 1e-7) == exact
    assert result.error <= result.worst_error
    assert result.worst in files


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("size", ["60KB", "200KB"])
def test_shards_stay_as_they_are_cut(architecture: str, size: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", architecture)
    shard(base, size)
    described = BaseModel.from_pretrained(base)
    adapter = write_own("full", described, tmp_path / "adapter")
    result = merge(str(base), adapter, tmp_path / "merged")
    assert len(weights_of(base)) > 2
    for before in weights_of(base):
        assert load_file(before).keys() == load_file(tmp_path / "merged" / before.name).keys()
    assert result.parameters >= len(described.linears)
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, adapter), atol=1e-4, rtol=1e-4)


def test_a_file_in_which_nothing_changes_is_the_same_file(base: Path, tmp_path: Path) -> None:
    shard(base, "60KB")
    one = write_own(
        "lora", BaseModel.from_pretrained(base), tmp_path / "one", target_modules="model.layers.0.mlp.up_proj"
    )
    merge(str(base), one, tmp_path / "merged")
    same = [f for f in weights_of(base) if f.read_bytes() == (tmp_path / "merged" / f.name).read_bytes()]
    assert len(same) == len(weights_of(base)) - 1


def test_a_tied_head_that_is_stored_twice_stays_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    embedding = next(t for name, t in tensors.items() if name.endswith("wte.weight"))
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_own("full", BaseModel.from_pretrained(base), tmp_path / "adapter")
    merge(str(base), adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "failure", [OSError("no space left"), KeyboardInterrupt(), RuntimeError("x")], ids=lambda content: repr(content)[:8]
)
def test_whatever_fails_leaves_nothing_behind(failure: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_output(tmp_path / "out") as place:
            (place / "part").write_text("half")
            raise failure

    with pytest.raises((FailedPreconditionError, KeyboardInterrupt, RuntimeError)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing_behind_either(tmp_path: Path) -> None:
    def write() -> None:
        with ended_by_sigterm(), atomic_output(tmp_path / "out") as place:
            (place / "part").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_command_merges_and_prints_json(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(["merge", *given, "--dtype", "bfloat16", "--no-verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dtype"], report["logit_error"]) == ("bfloat16", None)
    assert 0 < report["error"] <= report["worst_error"]


@pytest.mark.parametrize("where", ["base", "adapter", "a parent of both"])
def test_what_is_read_is_never_overwritten(where: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    output = {"base": base, "adapter": own, "a parent of both": tmp_path}[where]
    with pytest.raises(FailedPreconditionError, match="which is read"):
        merge(str(base), own, output, overwrite=True)
    assert (base / "config.json").exists()


def test_nothing_but_a_model_is_overwritten(base: Path, adapter: Path, tmp_path: Path) -> None:
    (output := tmp_path / "home").mkdir()
    (output / "letters.txt").write_text("dear")
    with pytest.raises(FailedPreconditionError, match="not empty"):
        merge(str(base), adapter, output)
    with pytest.raises(FailedPreconditionError, match="it is not a model's directory, and is not overwritten"):
        merge(str(base), adapter, output, overwrite=True)
    assert (output / "letters.txt").read_text() == "dear"


def test_a_dtype_that_is_not_known_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="dtype is auto, float32"):
        merge(str(base), adapter, tmp_path / "merged", dtype="int8")


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    houlsby = write_own("houlsby", BaseModel.from_pretrained(base), tmp_path / "adapter")
    with pytest.raises(NotMergeableError, match="nonlinearity"):
        merge(str(base), houlsby, tmp_path / "merged")
    assert left(tmp_path / "merged") == []


def test_a_weight_that_overflows_the_written_dtype_is_named(base: Path, tmp_path: Path) -> None:
    adapter = write_own("full", BaseModel.from_pretrained(base), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1e7 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InvalidAdapterError, match=r"overflow in torch\.float16"):
        merge(str(base), adapter, tmp_path / "merged", dtype="float16")
    assert left(tmp_path / "merged") == []


EMPTY: dict[str, Callable[[Path], object]] = {
    "no tensors": lambda file: save_file({}, file),
    "no bytes": lambda file: file.write_bytes(b""),
    "no values": lambda file: save_file({name: t[:0].clone() for name, t in load_file(file).items()}, file),
    "a pickle of nothing": lambda file: torch.save({}, file.rename(file.with_suffix(".bin"))),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_converting_an_empty_file_is_refused(kind: str, adapter: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    EMPTY[kind](own / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match=r"empty|damaged|truncated"):
        convert(own, tmp_path / "out")
    assert left(tmp_path / "out") == []

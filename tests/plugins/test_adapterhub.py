"""AdapterHub's adapters: converted, they give the logits that AdapterHub's own library computed.

Fixtures: tests/deltamux_testing/adapterhub/make.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig

from deltamux.cli import main
from deltamux.deltas import BaseModel, BlockSite, Checkpoint, attached
from deltamux.deltas.checkpoint import read_config, read_tensors
from deltamux.errors import BaseMismatchError, InvalidAdapterError, InvalidConfigError
from deltamux.registry import Registry
from deltamux_testing.adapterhub.make import ADAPTERS, BASES, HERE, IDS, LOGITS_FILE, build_base
from deltamux_testing.adapters import read_program, write_own
from deltamux_trainers import convert

LOGITS = load_file(LOGITS_FILE)
METHODS = {
    "DoubleSeqBnConfig": "houlsby",
    "SeqBnConfig": "pfeiffer",
    "AdapterPlusConfig": "pfeiffer",
    "ParBnConfig": "parallel",
    "LoRAConfig": "lora",
    "IA3Config": "ia3",
}
"""By AdapterHub's config class."""


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseModel]:
    return {name: BaseModel.from_model(build_base(name)) for name in BASES}


def foreign(name: str, tensors: dict[str, torch.Tensor] | None = None, **options: Any) -> Checkpoint:
    """Returns a fixture as AdapterHub saved it, with other options; a None takes an option away."""
    config = read_config(HERE / name / "adapter_config.json")
    given = {key: value for key, value in {**config["config"], **options}.items() if value is not None}
    stored, metadata = read_tensors(HERE / name / "adapter.safetensors")
    return Checkpoint({**config, "config": given}, stored if tensors is None else tensors, metadata)


@torch.no_grad()
def logits(base: BaseModel, model_name: str, directory: Path) -> torch.Tensor:
    model = build_base(model_name)
    with attached(model, base, read_program(directory, base)):
        values: torch.Tensor = model(IDS).logits
    return values


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_those_of_the_fixtures(name: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(build_base(name)(IDS).logits, LOGITS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_converted_adapter_gives_the_logits_of_adapterhubs_own_library(
    name: str, bases: dict[str, BaseModel], tmp_path: Path
) -> None:
    base, config, _ = ADAPTERS[name]
    assert convert(HERE / name, tmp_path / "out") == METHODS[config]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    torch.testing.assert_close(logits(bases[base], base, tmp_path / "out"), LOGITS[name], atol=1e-4, rtol=0)
    assert (LOGITS[name] - LOGITS[base]).abs().max() > 0.5, "the adapter must be visible, or this test could not fail"


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("houlsby", {"ln_before": True}, "ln_before"),
        ("houlsby", {"ln_after": True}, "ln_after"),
        ("houlsby", {"use_gating": True}, "use_gating"),
        ("houlsby", {"phm_layer": True}, "phm_layer"),
        ("houlsby", {"inv_adapter": "nice"}, "inv_adapter"),
        ("houlsby", {"cross_adapter": True}, "cross_adapter"),
        ("houlsby", {"non_linearity": "mish"}, "non_linearity"),
        ("houlsby", {"scaling": "learned"}, "scaling"),
        ("houlsby", {"scaling": "wide"}, "scaling"),
        ("houlsby-learned", {"scaling": 1.0}, "scaling"),
        ("houlsby", {"original_ln_after": False}, "original_ln_after"),
        ("pfeiffer", {"residual_before_ln": False}, "original_ln_after"),
        ("plus", {"residual_before_ln": True}, "original_ln_after"),
        ("pfeiffer", {"residual_before_ln": "post_add"}, "residual_before_ln"),
        ("parallel", {"original_ln_after": False}, "original_ln_after"),
        ("parallel", {"mh_adapter": True}, "mh_adapter"),
        ("pfeiffer", {"leave_out": ["0"]}, "leave_out"),
        ("pfeiffer", {"leave_out": [10**9]}, "leave_out"),
        ("pfeiffer", {"something_new": 1}, "something_new"),
        ("lora", {"use_gating": True}, "use_gating"),
        ("lora", {"use_dora": True}, "use_dora"),
        ("lora", {"vera_d": 0.1}, "vera_d"),
        ("lora", {"alpha": "8"}, "alpha"),
        ("lora", {"composition_mode": "new"}, "composition_mode"),
        ("lora", {"architecture": "mtl_lora"}, "architecture"),
        ("lora", {"architecture": "prefix_tuning"}, "architecture"),
        ("gpt2-lora", {"selfattn_lora": True}, "selfattn_lora"),
    ],
)
def test_an_option_that_cannot_be_served_exactly_is_refused_by_name(
    name: str, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidConfigError, match=field) as refused:
        Registry().recognise(foreign(name, **options))
    assert refused.value.metadata["field"] == field


def test_a_base_that_was_not_compared_is_refused() -> None:
    checkpoint = foreign("houlsby")
    with pytest.raises(InvalidConfigError, match="only llama, mistral, gpt2") as refused:
        Registry().recognise(Checkpoint({**checkpoint.config, "model_type": "bert"}, checkpoint.tensors))
    assert refused.value.metadata["field"] == "model_type"


@pytest.mark.parametrize("name", ["houlsby", "lora", "ia3"])
def test_a_tensor_that_belongs_to_nothing_is_refused_by_name(name: str) -> None:
    checkpoint = foreign(name)
    with pytest.raises(InvalidAdapterError, match=r"invertible_adapters\.x") as refused:
        Registry().recognise(foreign(name, {**checkpoint.tensors, "invertible_adapters.x": torch.zeros(1)}))
    assert refused.value.reason == "UNCLAIMED_TENSOR"


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "lora", "ia3"])
def test_an_empty_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidAdapterError, match="holds no"):
        Registry().recognise(foreign(name, {}))


def test_a_lora_from_before_the_scale_was_applied_keeps_none() -> None:
    checkpoint = foreign("lora-everywhere")
    assert Registry().recognise(checkpoint)[1].config["lora_alpha"] == 16
    old = Checkpoint({**checkpoint.config, "version": "adapters.1.0.1"}, checkpoint.tensors)
    assert Registry().recognise(old)[1].config["lora_alpha"] == 4


def test_an_activation_from_before_versions_is_read_as_adapterhub_does() -> None:
    checkpoint = foreign("pfeiffer-one-layer")
    assert Registry().recognise(checkpoint)[1].config["activation"] == "gelu"
    old = {key: value for key, value in checkpoint.config.items() if key != "version"}
    assert Registry().recognise(Checkpoint(old, checkpoint.tensors))[1].config["activation"] == "gelu_new"


def test_a_bottleneck_on_the_residual_stream_is_refused_where_no_norm_reads_that(bases: dict[str, BaseModel]) -> None:
    method, checkpoint = Registry().recognise(foreign("pfeiffer"))
    config, base = method.parse(checkpoint.config), bases["llama"]
    assert all(block.norm is not None for block in base.blocks)
    blind = {k: replace(site, norm=None) if isinstance(site, BlockSite) else site for k, site in base.sites.items()}
    with pytest.raises(BaseMismatchError, match="reads the residual stream"):
        method.program(config, replace(base, sites=blind), checkpoint.tensors)


@pytest.mark.parametrize("is_before", [True, False])
def test_only_a_norm_before_a_sub_layer_counts_as_one(is_before: bool) -> None:
    config = OPTConfig(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, do_layer_norm_before=is_before
    )
    norms = [block.norm for block in BaseModel.from_config(config).blocks]
    layer = "model.decoder.layers.0"
    in_front = [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    assert norms == (in_front if is_before else [None, None])


# The command.


def test_the_command_writes_what_an_upload_takes(
    bases: dict[str, BaseModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(HERE / "houlsby"), str(tmp_path / "out")]) == 0
    assert "houlsby adapter written to" in capsys.readouterr().out
    torch.testing.assert_close(logits(bases["llama"], "llama", tmp_path / "out"), LOGITS["houlsby"], atol=1e-4, rtol=0)
    assert main(["convert", str(HERE / "houlsby"), str(tmp_path / "out")]) == 1
    assert "OUTPUT_EXISTS" in capsys.readouterr().err


def test_the_command_names_the_option_that_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(HERE / "pfeiffer", tmp_path / "source"))
    config = read_config(source / "adapter_config.json")
    config["config"]["ln_before"] = True
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "field=ln_before" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapterhubs_own_pickle_is_converted(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HERE / "lora", tmp_path / "source"))
    torch.save(load_file(source / "adapter.safetensors"), source / "pytorch_adapter.bin")
    (source / "adapter.safetensors").unlink()
    assert convert(source, tmp_path / "out") == "lora"
    assert convert(HERE / "lora", tmp_path / "other") == "lora"
    written, other = (Checkpoint.read(tmp_path / name) for name in ("out", "other"))
    assert written.config == other.config
    assert all(torch.equal(written.tensors[name], tensor) for name, tensor in other.tensors.items())


def test_pefts_pickle_is_converted(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    plain, source = tmp_path / "plain", tmp_path / "source"
    write_own("lora", bases["llama"], plain)
    source.mkdir()
    shutil.copy(plain / "adapter_config.json", source)
    torch.save(load_file(plain / "adapter_model.safetensors"), source / "adapter_model.bin")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    expected = logits(bases["llama"], "llama", plain)
    assert torch.equal(logits(bases["llama"], "llama", tmp_path / "out"), expected)


class Evil:
    """Runs code where it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["code", "no tensors", "integers", "garbage"])
def test_a_pickle_of_more_than_tensors_is_refused_and_runs_nothing(content: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    integers = torch.arange(3, dtype=torch.int8)
    made = {"code": Evil(tmp_path / "pwned"), "no tensors": {"a": 1}, "integers": {"a": integers}}
    torch.save(made.get(content), source / "adapter_model.bin")
    if content == "garbage":
        (source / "adapter_model.bin").write_bytes(b"garbage")
    with pytest.raises(InvalidAdapterError):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter.safetensors"])
def test_a_directory_that_is_no_adapter_is_refused(missing: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(HERE / "lora", tmp_path / "source"))
    (source / missing).unlink()
    with pytest.raises(InvalidAdapterError, match="an adapter is a directory with") as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason == "MISSING_FILE"

"""Bases that read images as well: the sites are those of the language model, however large the other part is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bases.configs import READ_IMAGES, base_config, save_base
from deltamux.deltas import BaseModel
from deltamux.deltas.base_model import auto_model, read_base_config
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.base import EngineOptions
from deltamux.engine.vllm.frontend.config import engine_config
from deltamux.errors import FailedPreconditionError, InvalidAdapterError, InvalidConfigError
from deltamux_testing.adapters import read_program
from deltamux_trainers import convert
from deltamux_trainers.loading import describe_base, load_model

TEXT_ALONE = ("llama4", "qwen3_5")
"""Of these transformers loads the language model alone, as AutoModelForCausalLM."""
NEED_TORCHVISION = ("qwen2_vl", "qwen2_5_vl", "gemma3", "llama4")

FIRST, *OTHERS = READ_IMAGES
MARKED = [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("name", MARKED)
def test_the_sites_are_those_of_the_language_model(name: str) -> None:
    config = base_config(name)
    base = BaseModel.from_config(config)
    named = [*(site.name for site in base.linears), *(site.name for site in base.norms), base.embedding.name]
    part = base.embedding.name.rpartition(".")[0]
    assert part in (("model",) if name in TEXT_ALONE else ("model.language_model", "model.text_model"))
    assert all(name.startswith(f"{part}.") for name in named)
    assert {site.layer for site in base.linears} == {0, 1}
    assert base.head is not None
    assert (base.head.name, base.head.vocab_size) == ("lm_head", config.get_text_config().vocab_size)


@pytest.mark.parametrize("name", MARKED)
def test_the_weights_are_found_by_the_names_that_the_files_have(name: str, tmp_path: Path) -> None:
    """The checkpoint is that of the whole model, in whose names transformers saves it."""
    base = describe_base(str(save_base(tmp_path, name)))
    loaded = dict(load_model(str(tmp_path), "float32", "cpu").named_parameters())
    assert base.head is not None
    sites: list[Any] = [*base.linears, *base.norms, base.embedding, *([] if base.head.tied_to else [base.head])]
    for parameter in (*(f"{site.name}.weight" for site in sites), *(site.name for site in base.experts)):
        assert torch.equal(base.tensor(parameter), loaded[parameter]), parameter


def test_a_base_counts_positions_from_where_its_model_does() -> None:
    """PaliGemma's first position is 1; vLLM's is 0, so that the distance from virtual tokens would be another."""
    first = {name: BaseModel.from_config(base_config(name)).attentions[0].first_position for name in READ_IMAGES}
    assert {name: position for name, position in first.items() if position} == {"paligemma": 1}


def test_a_prefix_of_names_leads_from_the_language_model_to_the_files(tmp_path: Path) -> None:
    directory = save_base(tmp_path, "qwen3_5")
    files = BaseModel.from_pretrained(directory).files
    assert files is not None
    assert ("model", "model.language_model") in files.prefixes()
    assert WeightFiles.locate(directory).prefixes() == set()


# Adapters.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl")


def wrapped(directory: Path, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model: nn.Module = auto_model(read_base_config(directory)).from_pretrained(directory)
    return peft.get_peft_model(model, config)


def test_an_adapter_of_what_reads_images_too_is_refused_with_the_reason(qwen: Path, tmp_path: Path) -> None:
    wrapped(qwen, target_modules="all-linear").save_pretrained(str(tmp_path))
    with pytest.raises(
        InvalidAdapterError, match=r"'model\.visual\S+' is outside the base's language model"
    ) as refused:
        read_program(tmp_path, BaseModel.from_pretrained(qwen))
    assert refused.value.reason == "UNCLAIMED_TENSOR"
    assert "exclude_modules" in refused.value.message
    assert len(refused.value.message) < 900


@pytest.mark.parametrize(
    ("targets", "reason"),
    [(["qkv"], "made for what reads images"), (r".*visual.*\.qkv", "matches no projection of Qwen2VL")],
    ids=["by name", "by expression"],
)
def test_an_adapter_of_what_reads_images_alone_has_no_target(
    targets: Any, reason: str, qwen: Path, tmp_path: Path
) -> None:
    wrapped(qwen, target_modules=targets).save_pretrained(str(tmp_path))
    with pytest.raises(InvalidConfigError, match=reason):
        read_program(tmp_path, BaseModel.from_pretrained(qwen))


def test_an_adapter_without_what_reads_images_is_read_as_peft_writes_it(qwen: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(qwen)
    wrapped(qwen, target_modules="all-linear", exclude_modules=".*visual.*").save_pretrained(str(tmp_path))
    assert {site for site, _ in read_program(tmp_path, base)} == {site.name for site in base.linears}


@pytest.mark.parametrize(
    "other",
    [
        lambda name: name.replace("model.language_model.", "model."),
        lambda name: name.replace("model.language_model.", "language_model.model."),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    ],
    ids=["before 4.52", "the language model alone", "with the adapter's name"],
)
def test_other_names_of_the_language_model_are_converted_by_the_base(other: Any, qwen: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(qwen)
    wrapped(qwen, target_modules=["q_proj", "v_proj"]).save_pretrained(str(tmp_path / "old"))
    file = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({other(name): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(InvalidAdapterError, match="deltamux convert ADAPTER NEW --model BASE"):
        read_program(tmp_path / "old", base)
    convert(tmp_path / "old", tmp_path / "new", model=qwen)
    converted = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert converted.keys() == tensors.keys()
    assert len(list(read_program(tmp_path / "new", base))) == 4


# Starts.


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("name", NEED_TORCHVISION)
def test_a_start_without_torchvision_names_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="pip install torchvision") as refused:
        engine_config(EngineOptions(str(save_base(tmp_path, name)), max_model_len=64))
    assert refused.value.reason == "TORCHVISION_MISSING"

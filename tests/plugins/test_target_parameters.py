"""PEFT's target_parameters: LoRA at the experts of mixtures is read from PEFT and written for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from bases.configs import base_config, save_base
from deltamux.conformance.bases import save_base as save_plain_base
from deltamux.deltas import BaseModel, Checkpoint, LowRank, LowRankExperts
from deltamux.errors import DeltamuxError, InvalidConfigError
from deltamux_plugins.unipelt import UniPELTConfig
from deltamux_testing.adapters import read_program, refusal, registry, write_own
from deltamux_testing.training import logits, logits_of_peft
from deltamux_trainers import convert, merge

# PEFT looks for the modules of its patterns, and finds none where they are of parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

MIXTURES = ("qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3")
"""Experts whose parameters are [out, in], transposed, and transposed undeclared; and those after a dense layer."""
CHOICES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["o_proj"]},
    "one": {"target_parameters": ["experts.down_proj"], "target_modules": []},
    "patterns": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["o_proj"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {r".*layers\.1.*gate_up_proj": 20},
        "use_rslora": True,
    },
}
FIRST, *OTHERS = MIXTURES


@pytest.fixture(scope="module", params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def base(directory: Path) -> BaseModel:
    return BaseModel.from_pretrained(directory)


@pytest.fixture(scope="module")
def dense_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.from_pretrained(save_plain_base(tmp_path_factory.mktemp("gpt2"), "gpt2"))


def write_peft(directory: Path, adapter: Path, **options: Any) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(adapter))


@pytest.mark.parametrize("choice", CHOICES)
def test_what_peft_wrote_computes_what_peft_computes(choice: str, directory: Path, tmp_path: Path) -> None:
    write_peft(directory, tmp_path, **CHOICES[choice])
    ours = logits(directory, tmp_path)
    torch.testing.assert_close(ours, logits_of_peft(directory, tmp_path), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, logits(directory), atol=1e-2), "the adapter must be visible"


@pytest.mark.parametrize("choice", CHOICES)
def test_what_we_write_peft_loads_with_equal_logits(
    choice: str, directory: Path, base: BaseModel, tmp_path: Path
) -> None:
    ours = logits(directory, write_own("lora", base, tmp_path, r=4, **CHOICES[choice]))
    torch.testing.assert_close(ours, logits_of_peft(directory, tmp_path), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, logits(directory), atol=1e-2), "the adapter must be visible"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2"])
def test_all_linear_of_peft_is_read_with_router_and_experts(name: str, tmp_path: Path) -> None:
    """PEFT writes target_parameters by itself here, and doubles the rank of the two projections that are one."""
    directory = save_base(tmp_path / "base", name)
    write_peft(directory, tmp_path / "adapter", target_modules="all-linear")
    base = BaseModel.from_pretrained(directory)
    program = read_program(tmp_path / "adapter", base)
    ops = {site: op for site, op in program if isinstance(op, LowRankExperts)}
    assert {site.name: 8 if "gate_up" in site.name else 4 for site in base.experts} == {
        site: op.rank() for site, op in ops.items()
    }
    assert {site.name for site in base.routers} <= {site for site, op in program if isinstance(op, LowRank)}
    ours = logits(directory, tmp_path / "adapter")
    torch.testing.assert_close(ours, logits_of_peft(directory, tmp_path / "adapter"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_attention", [False, True])
def test_lora_of_single_experts_is_refused_as_what_it_is(with_attention: bool, tmp_path: Path) -> None:
    """As PEFT wrote it on transformers 4, where each expert had projections of its own."""
    base = BaseModel.from_pretrained(save_base(tmp_path, "qwen3_moe"))
    paths = {f"model.layers.{layer}.mlp.experts.2.gate_proj": (64, 64) for layer in range(2)}
    if with_attention:
        queries = [site for site in base.linears if site.name.endswith("q_proj")]
        paths |= {site.name: (site.in_features, site.out_features) for site in queries}
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": torch.ones(shape)
        for path, (width, out) in paths.items()
        for side, shape in (("A", (4, width)), ("B", (out, 4)))
    }
    targets = ["gate_proj", *["q_proj"] * with_attention]
    error = refusal({"peft_type": "LORA", "r": 4, "target_modules": targets}, base, tensors)
    assert "projections of single experts" in error.message
    assert error.message.endswith("train with target_parameters")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_merge_into_the_files_of_the_base(name: str, tmp_path: Path) -> None:
    """Of a base in several files, each of which holds some experts."""
    saved = save_base(tmp_path / "saved", name)
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "base", max_shard_size="80KB")
    base = BaseModel.from_pretrained(tmp_path / "base")
    write_own("lora", base, tmp_path / "adapter", r=2, **CHOICES["both"])
    result = merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert result.logit_error is not None
    assert result.logit_error < 1e-4
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    changed = logits(tmp_path / "merged")
    assert not torch.allclose(changed, logits(tmp_path / "base"), atol=1e-2), "the adapter must be visible"


@pytest.mark.parametrize("with_base", [False, True])
def test_names_of_a_state_dict_become_those_of_pefts_files(with_base: bool, tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base", "qwen3_moe")
    base = BaseModel.from_pretrained(directory)
    write_own("lora", base, tmp_path / "adapter", r=4, **CHOICES["patterns"])
    own = Checkpoint.read(tmp_path / "adapter")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in own.tensors.items()}
    Checkpoint(own.config, named, own.metadata).write(tmp_path / "named")
    with pytest.raises(DeltamuxError, match="deltamux convert ADAPTER NEW"):
        read_program(tmp_path / "named", base)
    convert(tmp_path / "named", tmp_path / "new", model=str(directory) if with_base else "")
    found = Checkpoint.read(tmp_path / "new")
    assert found.tensors.keys() == own.tensors.keys()
    kept = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    assert {key: found.config[key] for key in kept} == {key: own.config[key] for key in kept}
    assert torch.equal(logits(directory, tmp_path / "new"), logits(directory, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_parameters": ["mlp.experts.up"]}, r"\(mlp.experts.up\) names no parameter of .*experts.gate_up_proj"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
            "names model.layers.0.self_attn.q_proj.weight, whose module target_modules names",
        ),
        ({"target_parameters": ["experts.down_proj"], "use_dora": True}, "goes with neither use_dora nor lora_dropout"),
        ({"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1}, "goes with neither use_dora nor lora"),
        ({"peft_type": "ADALORA", "target_parameters": ["experts.down_proj"]}, "PEFT 0.17 brought it"),
        ({"target_modules": ["nowhere"]}, "names no projection"),
    ],
)
def test_what_target_parameters_cannot_name_is_refused(values: dict[str, Any], words: str) -> None:
    base = BaseModel.from_config(base_config("qwen3_moe"))
    with pytest.raises(InvalidConfigError, match=words):
        raise refusal({"peft_type": "LORA", "target_modules": [], **values}, base)


def test_a_weight_that_is_stored_transposed_is_refused(dense_base: BaseModel) -> None:
    with pytest.raises(InvalidConfigError, match="which is stored transposed"):
        raise refusal({"peft_type": "LORA", "target_modules": [], "target_parameters": ["c_fc.weight"]}, dense_base)


def test_factors_of_another_rank_are_refused(tmp_path: Path) -> None:
    directory = save_base(tmp_path / "base", "qwen3_moe")
    base = BaseModel.from_pretrained(directory)
    write_own("lora", base, tmp_path / "adapter", r=4, **CHOICES["one"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 3'))
    with pytest.raises(DeltamuxError, match=r"experts.down_proj.lora_A has shape \[16, 64\], but .* rank 3"):
        read_program(tmp_path / "adapter", base)


def test_unipelts_gates_are_at_projections_alone() -> None:
    lora = registry().get("lora").parse({"target_parameters": ["experts.down_proj"]})
    with pytest.raises(InvalidConfigError, match="names other targets"):
        UniPELTConfig(lora=lora)

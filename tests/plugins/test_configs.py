"""What a config may say: keys that are known, values of their type, targets as PEFT finds them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidConfigError
from deltamux.registry import Registry
from deltamux_plugins.targets import by_pattern, targets

HOSTILE = "(?:.|..|...)*[0-9]{3}"
"""Takes exponentially long on a path of some length."""


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("lora", {"use_rslora": "no"}),
        ("lora", {"lora_alpha": "16"}),
        ("lora", {"r": 4.5}),
        ("lora", {"r": True}),
        ("lora", {"rank_pattern": ["q_proj"]}),
        ("lora", {"rank_pattern": {"q_proj": "4"}}),
        ("lora", {"target_modules": [1]}),
        ("lora", {"lora_alpha": float("nan")}),
        ("houlsby", {"scale": float("inf")}),
        ("houlsby", {"bottleneck": True}),
        ("prefix", {"num_virtual_tokens": "8"}),
        ("mam", {"prefix": {"num_virtual_tokens": "8"}}),
        ("mam", {"prefix": 3}),
        ("topk", {"num_layers": [1]}),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_option(method: str, values: dict[str, Any]) -> None:
    (option,) = values
    with pytest.raises(InvalidConfigError, match=rf"{option}.* is .*, but ") as refused:
        Registry().get(method).parse(values)
    assert refused.value.metadata["field"]


@pytest.mark.parametrize("method", [m.name for m in Registry().methods() if not m.info.in_peft])
def test_every_format_of_our_own_has_a_version_that_is_checked(method: str) -> None:
    assert Registry().get(method).parse({"format_version": 1}).format_version == 1
    with pytest.raises(InvalidConfigError, match="format_version 2 is not known here; known: 1"):
        Registry().get(method).parse({"format_version": 2})


def test_an_unknown_option_of_a_component_is_refused_too() -> None:
    with pytest.raises(InvalidConfigError, match=r"'mam\.prefix' has no option 'length'"):
        Registry().get("mam").parse({"prefix": {"length": 3}})


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"rank_pattern": {"q_proj": 0}},
        {"lora_dropout": 1.0},
        {"bias": "some"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "lottery"},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="|".join(values)):
        Registry().get("lora").parse(values)


def test_what_cannot_be_trained_from_is_refused_when_training_begins(base: BaseModel) -> None:
    lora = Registry().get("lora")
    for init in (False, "eva"):
        config = lora.parse({"init_lora_weights": init})
        with pytest.raises(InvalidConfigError, match="init_lora_weights"):
            lora.parameters(config, base)


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "(?P<"])
def test_a_pattern_that_is_no_regular_expression_is_refused(pattern: str, base: BaseModel) -> None:
    with pytest.raises(InvalidConfigError, match="is not a regular expression"):
        targets(Registry().get("lora").parse({"target_modules": pattern}), base)


def test_a_hostile_regular_expression_is_refused_within_a_time_limit(base: BaseModel) -> None:
    started = time.monotonic()
    for values in ({"target_modules": HOSTILE}, {"rank_pattern": {HOSTILE: 3}}):
        lora = Registry().get("lora")
        with pytest.raises(InvalidConfigError, match="takes too long"):
            lora.parameters(lora.parse(values), base)
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "All-Linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "model.layers.0.self_attn.k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["up_proj", "q_proj"], "exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {"target_modules": ["up_proj", "q_proj"], "exclude_modules": r".*1\.mlp.*"},
        {"target_modules": None},
        {"target_modules": r"^(?!.*layers\.0).*(q_proj|up_proj)$"},
        {"target_modules": r"model\.layers\.(0|1)\.(self_attn\.(q|k)_proj|mlp\.down_proj)"},
        {"target_modules": ["q_proj", "q_proj", "nowhere", "1.mlp.up_proj", "model.layers.0.mlp.gate_proj"]},
        {"target_modules": ["q_proj", "k_proj", "o_proj"], "modules_to_save": ["k_proj", r"0.self_attn.o_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
    ],
)
def test_targets_are_those_that_peft_takes(values: dict[str, Any], base: BaseModel, base_directory: Path) -> None:
    chosen = {site.name for site in targets(Registry().get("lora").parse(values), base)}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **values)
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_directory), config)
    assert chosen == set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "patterns",
    [
        {r"^model\.layers\.0\.self_attn\.q_proj": 2, "q_proj": 3},
        {r".*\.layers\.3\..*(q_proj|k_proj)$": 2, "layers.3": 4},
        {"q_proj|k_proj": 2, "self_attn.q_proj": 3, "nowhere": 9},
        {"layers.1": 2, "layers.1.self_attn.q_proj": 3},
        {"model.layers.1.mlp.experts[0]": 2},
        {r"(self|cross)_attn\.(q|k)_proj": 5},
    ],
)
def test_ranks_are_looked_up_by_pattern_as_peft_does(patterns: dict[str, int]) -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "mlp.experts[0]"]
    for path in [f"model.layers.{layer}.{name}" for layer in (0, 1, 3, 11, 13) for name in names]:
        assert by_pattern(patterns, path) == patterns.get(get_pattern_key(list(patterns), path)), path


def test_layers_may_be_chosen_of_all_linears(base: BaseModel) -> None:
    config = Registry().get("lora").parse({"target_modules": "all-linear", "layers_to_transform": [1]})
    assert {site.layer for site in targets(config, base)} == {1}

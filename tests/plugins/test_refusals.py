"""What adapter_config.json says: taken as PEFT takes it, or refused in words that a person can act on."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, get_type_hints

import peft.utils.constants
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltamux import patterns
from deltamux.conformance.cases import base_directory
from deltamux.deltas import BaseModel, Checkpoint
from deltamux.errors import DeltamuxError, InvalidConfigError, UnknownMethodError
from deltamux.patterns import begin_config, match
from deltamux.registry import Registry
from deltamux_plugins import peft_defaults
from deltamux_plugins.prompt import text_ids
from deltamux_plugins.targets import targets
from deltamux_testing.adapters import read_program, refusal, write_own, write_peft

REGISTRY = Registry()
ENCODERS = {"bart", "bert", "electra", "roberta", "rwkv", "xlm-roberta"}
"""Not decoders, or without projections; nothing of theirs is a base here."""

WEIGHTS = "adapter_model.safetensors"


# Which modules a config means.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"target_modules": "q_proj"},
            r"regular expression over whole paths.*\".*\\\\.q_proj\", or the list \[\"q_proj\"\]",
        ),
        ({"target_modules": r".*\.query"}, r"regular expression.*whose paths are such as 'model\.layers\.0"),
        ({"target_modules": ["query", "value"]}, r"\(query, value\) names no projection of LlamaForCausalLM.*q_proj"),
        ({"target_modules": [f"m{i}.x" for i in range(196)]}, r"and 190 more\) names no projection"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules leave none"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [40]}, "layers_to_transform leave none"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "modules_to_save leave none"),
    ],
)
def test_targets_that_mean_nothing_are_refused_with_what_the_base_has(
    values: dict[str, Any], words: str, base: BaseModel
) -> None:
    error = refusal({"peft_type": "LORA", **values}, base)
    assert error.metadata["field"] == "target_modules"
    with pytest.raises(DeltamuxError, match=words):
        raise error


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (peft_defaults.LORA_TARGETS, "LORA_TARGET"),
        (peft_defaults.VERA_TARGETS, "VERA_TARGET"),
        (peft_defaults.ADALORA_TARGETS, "ADALORA_TARGET"),
        (peft_defaults.LN_TARGETS, "LNTUNING_TARGET"),
        (peft_defaults.IA3_TARGETS, "IA3_TARGET"),
        (peft_defaults.IA3_FEEDFORWARD, "IA3_FEEDFORWARD"),
    ],
)
def test_targets_of_null_are_those_of_pefts_own_table(table: dict[str, Any], theirs: str) -> None:
    known = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{theirs}_MODULES_MAPPING")
    expected = {kind: names for kind, names in known.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    sets = {kind: names if isinstance(names, str) else set(names) for kind, names in table.items()}
    assert sets == {
        kind: names if isinstance(names, str) else set(names)
        for kind, names in expected.items()
        if kind not in ENCODERS
    }


def test_a_file_without_targets_means_pefts_and_training_means_every_projection(base: BaseModel) -> None:
    lora, read = REGISTRY.recognise(Checkpoint({"peft_type": "LORA"}, {}))
    assert {site.name.rpartition(".")[2] for site in targets(lora.parse(read.config), base)} == {"q_proj", "v_proj"}
    assert len(targets(lora.parse({}), base)) == len(base.linears)


# Values of null, and keys that are not known.


def own_fields() -> list[tuple[str, str]]:
    """Returns (method, key) of every key that PEFT's config class and ours share, and that PEFT gives a value."""
    classes = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    found: list[tuple[str, str]] = []
    for method in REGISTRY.methods():
        theirs = classes.get(method.info.peft_type)
        if theirs is None or method.info.files_of:
            continue
        defaults = {f.name: f for f in dataclasses.fields(theirs)}
        for name in get_type_hints(method.info.config_class):
            field = defaults.get(name)
            if field is not None and (field.default is not None or field.default_factory is not dataclasses.MISSING):
                found.append((method.name, name))
    return [(method, name) for method, name in found if name not in ("tinit", "tfinal", "peft_targets")]


@pytest.mark.parametrize(("method", "key"), own_fields())
def test_null_means_a_default_only_where_pefts_default_is_null(method: str, key: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{key} is null.*, but needs a value") as refused:
        REGISTRY.get(method).parse({key: None})
    assert refused.value.metadata["field"] == key


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_qalora": True}, "use_qalora .*PEFT 0.16 brought it.*merge"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config .*PEFT 0.21"),
        ({"trainable_token_indices": [5, 9]}, r"trainable_token_indices \(\[5, 9\]\).*rows of the token embedding"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "rows of the token embedding"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"names no parameter of Llama.* that LoRA can change",
        ),
        ({"enable_lora": [True, False, True]}, "PEFT 0.1 brought it"),
        (
            {"flux_factor": 3, "peft_version": "0.29.0"},
            "'flux_factor'.*written by PEFT 0.29.0, and a PEFT newer than 0.21",
        ),
        ({"domain": "law", "task": "sum"}, "'domain', 'task'.*delete it from adapter_config.json"),
        ({f"note{i}": 1 for i in range(50)}, "and 44 more"),
    ],
)
def test_a_key_that_is_not_served_is_refused_with_what_it_is(
    values: dict[str, Any], words: str, base: BaseModel
) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        raise refusal({"peft_type": "LORA", "target_modules": ["q_proj"], **values}, base)


@pytest.mark.parametrize(
    "more",
    [
        {"enable_lora": None, "merge_weights": False},
        {"modules_to_save": ["lm_head", "classifier"]},
        {"peft_version": "0.19.2.dev0@UNKNOWN", "qalora_group_size": 16, "arrow_config": None, "megatron_config": {}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "revision": "main"},
        {"target_modules": ["q_proj", "v_proj", "q_proj", "to_k"], "rank_pattern": {"nowhere": 2}},
    ],
)
def test_keys_that_change_nothing_are_taken(more: dict[str, Any], base: BaseModel, tmp_path: Path) -> None:
    write_own("lora", base, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_config.json"
    before = read_program(tmp_path, base)
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert [site for site, _ in read_program(tmp_path, base)] == [site for site, _ in before]


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_a_file_without_its_number_of_virtual_tokens_is_refused(method: str, base: BaseModel) -> None:
    error = refusal({"peft_type": method}, base)
    assert "num_virtual_tokens is null or left out, but needs a value: give one" in error.message


SLOW = r"(\w+\.?)+\d\d"
"""Takes ages on a path, and matches none."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "LORA", "rank_pattern": {f"m{number}x?": 3 for number in range(30_000)}},
        {"peft_type": "LORA", "rank_pattern": {f"(.*.*.*.*.*)*x{number}": 3 for number in range(8000)}},
        {"peft_type": "LORA", "alpha_pattern": {SLOW: 3}},
        {"peft_type": "LORA", "modules_to_save": [f"m{number}" for number in range(50_000)]},
        {"peft_type": "LORA", "exclude_modules": [f"m{number}" for number in range(50_000)]},
        {"peft_type": "LORA", "target_modules": "(?i)(x{5000}){5000}"},
        {"peft_type": "LORA", "layers_to_transform": [0], "layers_pattern": [f"l{n}" for n in range(50_000)]},
        {"peft_type": "IA3", "feedforward_modules": [], "modules_to_save": [f"m{n}x?" for n in range(50_000)]},
        {"peft_type": "LN_TUNING", "target_modules": "x" * 900_000},
        {"peft_type": "MISS", "target_modules": SLOW},
        {"peft_type": "MISS", "exclude_modules": SLOW},
        {"peft_type": "C3A", "block_size_pattern": {SLOW: 3}},
        {"peft_type": "C3A", "block_size_pattern": {f"m{number}": 3 for number in range(8000)}},
        {"peft_type": "MISS", "layers_to_transform": [0], "layers_pattern": SLOW},
    ],
    ids=lambda values: f"{values['peft_type']}-{list(values)[-1]}",
)
def test_no_config_of_an_upload_takes_long(values: dict[str, Any], base: BaseModel, tmp_path: Path) -> None:
    write_own("lora", base, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **values}))
    begin = time.thread_time()
    with pytest.raises(DeltamuxError):
        read_program(tmp_path, base)
    assert time.thread_time() - begin < 8


def test_a_pattern_per_module_is_quick(base: BaseModel, tmp_path: Path) -> None:
    write_own("lora", base, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_config.json"
    more = {f"model.layers.{layer}.mlp.experts.{expert}": 2 for layer in range(80) for expert in range(50)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": more, "alpha_pattern": more}))
    begin = time.thread_time()
    assert read_program(tmp_path, base)
    assert time.thread_time() - begin < 4


def test_matches_that_are_asked_for_again_and_again_as_in_training_take_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin_config()
    assert match(r"(a|b)+\.q_proj", "a.q_proj")
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.0)
    for _ in range(1000):
        assert match(r"(a|b)+\.q_proj", "a.q_proj")
    with pytest.raises(InvalidConfigError, match="takes more than 0 s"):
        match(r"(a|b)+\.v_proj", "a.v_proj")


# Methods that are not served.


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("TRAINABLE_TOKENS", "changes rows of the token embedding"),
        ("ADAPTION_PROMPT", "attention over trained prompts"),
        ("XLORA", "mixes several LoRAs"),
        ("FROD", "factors the base's weights anew"),
    ],
)
def test_a_method_of_peft_that_is_no_change_of_weights_is_refused_by_what_it_is(kind: str, words: str) -> None:
    with pytest.raises(UnknownMethodError, match=f"{kind} are not served: it .*{words}") as refused:
        REGISTRY.recognise(Checkpoint({"peft_type": kind}, {}))
    assert refused.value.reason == "METHOD_NOT_SERVED"


def test_the_bridge_passes_over_unset_keys_that_pefts_class_lacks_and_names_set_ones(base: BaseModel) -> None:
    values = {"peft_type": "C3A", "block_size": 16, "target_modules": ["q_proj"]}
    unset: Any
    for unset in (None, [], ""):
        assert refusal({**values, "exclude_modules": unset}, base).reason == "MISSING_TENSOR"
    with pytest.raises(InvalidConfigError, match=r"PEFT's C3A has no option 'exclude_modules'.*delete it"):
        raise refusal({**values, "exclude_modules": ["o_proj"]}, base)


def test_the_bridge_finds_the_targets_of_null_as_peft_does(base: BaseModel) -> None:
    error = refusal({"peft_type": "MISS", "r": 4, "target_modules": None}, base)
    assert error.reason == "MISSING_TENSOR"
    assert "q_proj" in error.metadata["tensor"]


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize(
    ("architecture", "adapter", "part"),
    [
        ("llama", "ln-tuning", "norm.ln_tuning_layers.weight"),
        ("llama", "dora", "q_proj.lora_magnitude_vector"),
        ("llama", "dora", "q_proj.lora_B"),
        ("opt", "ln-tuning", "final_layer_norm.ln_tuning_layers.bias"),
        ("opt", "lora-bias-all", "fc1.base_layer.bias"),
        ("opt", "lora-bias-all", "final_layer_norm.bias"),
        ("opt", "lora-bias-own", "q_proj.base_layer.bias"),
    ],
)
def test_a_tensor_that_is_set_against_the_bases_own_has_its_shape_or_is_refused_as_another_bases(
    architecture: str, adapter: str, part: str, length: int, tmp_path: Path
) -> None:
    directory = base_directory(architecture)
    write_peft(adapter, architecture, directory, tmp_path)
    checkpoint = Checkpoint.read(tmp_path)
    name = next(name for name in checkpoint.tensors if part in name)
    before = checkpoint.tensors[name]
    tensors = {**checkpoint.tensors, name: torch.ones(length, *before.shape[1:])}
    assert refusal(dict(checkpoint.config), BaseModel.from_pretrained(directory), tensors).reason == "BASE_MISMATCH"


@pytest.mark.parametrize(
    ("tokenizer", "text", "problem"),
    [("/no/such", "be brief", "tokenizer_name_or_path '/no/such' cannot be read"), (None, "", "makes no token of")],
)
def test_a_text_that_a_prompt_cannot_start_from_is_refused(
    tokenizer: str | None, text: str, problem: str, base: BaseModel
) -> None:
    with pytest.raises(InvalidConfigError, match=problem):
        text_ids(text, tokenizer or base.name, 3)

"""Files as other writers leave them: served as PEFT serves them, or refused in words that a person can act on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, get_type_hints

import peft.utils.constants
import pytest
import torch
from adapters import read_program, write_own
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltamux.conformance.cases import base_directory
from deltamux.deltas import BaseModel, Checkpoint, Program
from deltamux.errors import DeltamuxError, InvalidAdapterError, InvalidConfigError, UnknownMethodError
from deltamux.registry import Registry
from deltamux_plugins import peft_defaults
from deltamux_plugins.targets import targets
from deltamux_trainers import convert

REGISTRY = Registry()
ENCODERS = {"bart", "bert", "electra", "roberta", "rwkv", "xlm-roberta"}
"""Not decoders, or without projections; nothing of theirs is a base here."""

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pretrained(base_directory("llama"))


@pytest.fixture(scope="module")
def grouped() -> BaseModel:
    return BaseModel.from_pretrained(base_directory("qwen2"))


@pytest.fixture(scope="module")
def good(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.read(write_own("lora", base, tmp_path_factory.mktemp("good"), r=4, use_dora=True))


def refusal(values: dict[str, Any], base: BaseModel, tensors: dict[str, torch.Tensor] | None = None) -> DeltamuxError:
    """Returns what reading an adapter with this config raises."""
    with pytest.raises(DeltamuxError) as refused:
        read(Checkpoint(values, tensors or {}), base)
    assert len(refused.value.message) < 1500
    return refused.value


def read(checkpoint: Checkpoint, base: BaseModel) -> Program:
    method, own = REGISTRY.recognise(checkpoint)
    return method.program(method.parse(own.config), base, own.tensors)


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
        ({"target_modules": []}, "names no projection"),
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
def test_null_stands_for_a_default_only_where_pefts_default_is_null(method: str, key: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{key} is null, but needs a value") as refused:
        REGISTRY.get(method).parse({key: None})
    assert refused.value.metadata["field"] == key


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_qalora": True}, "use_qalora .*PEFT 0.16 brought it.*merge"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config .*PEFT 0.21"),
        ({"trainable_token_indices": [5, 9]}, r"trainable_token_indices \(\[5, 9\]\).*rows of the token embedding"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "rows of the token embedding"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts"),
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


# Methods that are not served.


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("TRAINABLE_TOKENS", "changes rows of the token embedding"),
        ("ADAPTION_PROMPT", "attention over trained prompts"),
        ("XLORA", "mixes several LoRAs"),
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


# What stands in the file.

MANGLED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "sharded": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "parallel": lambda name: f"module.{name}",
    "adapter": lambda name: name.replace("lora_A", "lora_A.tickets").replace("lora_B", "lora_B.tickets"),
    "multimodal": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "clipped": lambda name: name.replace("_proj.lora", "_proj.linear.lora"),
    "bare": lambda name: name.removeprefix("base_model.model."),
    "twice": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("number", [1, 2, len(MANGLED) - 1])
def test_whatever_training_left_in_the_names_convert_takes_out(
    number: int, good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    for index, chosen in enumerate(combinations(MANGLED, number)):
        if {"bare", "twice"} <= set(chosen):
            continue
        names = {name: name for name in good.tensors}
        for mangle in chosen:
            names = {name: MANGLED[mangle](present) for name, present in names.items()}
        tensors = {names[name]: tensor for name, tensor in good.tensors.items()}
        error = refusal(dict(good.config), base, tensors)
        assert "Run `deltamux convert ADAPTER NEW`" in error.message, chosen
        source, written = tmp_path / f"{index}", tmp_path / f"{index}-written"
        Checkpoint(good.config, tensors).write(source)
        assert convert(source, written) == "lora"
        restored = Checkpoint.read(written)
        assert restored.tensors.keys() == good.tensors.keys(), chosen
        assert all(torch.equal(restored.tensors[name], good.tensors[name]) for name in good.tensors)
        assert restored.config == good.config


def test_several_adapters_in_one_file_are_refused_until_one_is_chosen(
    good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    def named(adapter: str, factor: float) -> dict[str, torch.Tensor]:
        return {
            name.replace("lora_A", f"lora_A.{adapter}")
            .replace("lora_B", f"lora_B.{adapter}")
            .replace("magnitude_vector", f"magnitude_vector.{adapter}"): factor * tensor
            for name, tensor in good.tensors.items()
        }

    tensors = named("ranking", 1.0) | named("search", 2.0)
    assert "2 adapters: ranking, search" in refusal(dict(good.config), base, tensors).message
    Checkpoint(good.config, tensors).write(tmp_path / "both")
    with pytest.raises(InvalidAdapterError, match=r"several adapters .ranking, search.: choose one"):
        convert(tmp_path / "both", tmp_path / "none")
    with pytest.raises(InvalidAdapterError, match="no tensor is of 'other'"):
        convert(tmp_path / "both", tmp_path / "none", adapter_name="other")
    convert(tmp_path / "both", tmp_path / "search", adapter_name="search")
    restored = Checkpoint.read(tmp_path / "search").tensors
    assert restored.keys() == good.tensors.keys()
    assert all(torch.equal(restored[name], 2.0 * good.tensors[name]) for name in restored)


def test_paths_of_the_model_without_its_head_are_completed_by_the_base(
    good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    tensors = {name.replace("model.model.model.", "model.model."): t for name, t in good.tensors.items()}
    assert "deltamux convert ADAPTER NEW --model BASE" in refusal(dict(good.config), base, tensors).message
    Checkpoint(good.config, tensors).write(tmp_path / "body")
    convert(tmp_path / "body", tmp_path / "whole", model=base_directory("llama"))
    assert Checkpoint.read(tmp_path / "whole").tensors.keys() == good.tensors.keys()


def test_targets_by_path_follow_the_names(good: Checkpoint, base: BaseModel, tmp_path: Path) -> None:
    tensors = {name.replace("model.layers", "model.language_model.layers"): t for name, t in good.tensors.items()}
    paths = [site.name.replace("model.layers", "model.language_model.layers") for site in base.linears]
    for index, chosen in enumerate((paths, r".*language_model.*\.(self_attn|mlp)\..*_proj")):
        Checkpoint({**good.config, "target_modules": chosen}, tensors).write(tmp_path / f"{index}")
        convert(tmp_path / f"{index}", tmp_path / f"{index}-written")
        assert {site for site, _ in read_program(tmp_path / f"{index}-written", base)} == {s.name for s in base.linears}


def test_a_missing_tensor_is_told_with_those_that_are_there(good: Checkpoint, base: BaseModel) -> None:
    tensors = dict(good.tensors)
    missing = tensors.popitem()[0]
    error = refusal(dict(good.config), base, tensors)
    assert error.reason == "MISSING_TENSOR"
    assert missing in error.message
    assert f"it holds {len(tensors)} tensor(s): {sorted(tensors)[0]}" in error.message


@pytest.mark.parametrize("spelling", ["lm_head.weight", "lm_head.base_layer.weight"])
def test_a_copy_of_the_bases_own_module_is_passed_over_and_a_changed_one_refused(
    spelling: str, good: Checkpoint, base: BaseModel
) -> None:
    lora, _ = REGISTRY.recognise(good)
    config = lora.parse({**good.config, "modules_to_save": ["lm_head", "embed_tokens"]})
    copies = {
        f"base_model.model.{spelling}": base.tensor("lm_head.weight"),
        "base_model.model.model.embed_tokens.weight": base.tensor("model.embed_tokens.weight"),
    }
    alone = lora.program(lora.parse(good.config), base, good.tensors)
    assert len(lora.program(config, base, {**good.tensors, **copies}).placements) == len(alone.placements)
    for name, tensor in copies.items():
        with pytest.raises(InvalidAdapterError, match=r"changes the .*, which is not served: train without it"):
            lora.program(config, base, {**good.tensors, name: tensor + 0.1})
    longer = torch.zeros(258, 64)
    with pytest.raises(InvalidAdapterError, match="258 rows there, and 256 in this base: the vocabulary was extended"):
        lora.program(config, base, {**good.tensors, "base_model.model.lm_head.weight": longer})


def test_trained_rows_of_the_embedding_are_named(good: Checkpoint, base: BaseModel) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)}
    assert "trained rows of the token embedding" in refusal(dict(good.config), base, {**good.tensors, **rows}).message


def test_an_adapter_for_as_many_key_heads_as_heads_is_told_from_one_for_grouped_queries(grouped: BaseModel) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        front = f"base_model.model.model.layers.{layer}.self_attn.k_proj"
        tensors |= {f"{front}.lora_A.weight": torch.ones(4, 64), f"{front}.lora_B.weight": torch.ones(64, 4)}
    error = refusal({"peft_type": "LORA", "r": 4, "target_modules": ["k_proj"]}, grouped, tensors)
    assert error.reason == "BASE_MISMATCH"
    assert "made for a base without grouped queries; this one has 1 key and value head(s)" in error.message

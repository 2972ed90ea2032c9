"""What an adapter's files hold: other names, other modules, other writers' layouts, and nothing at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux.client.uploads import upload_messages
from deltamux.conformance.cases import base_directory
from deltamux.deltas import BaseModel, Checkpoint, LowRank
from deltamux.errors import InvalidAdapterError
from deltamux.registry import Registry
from deltamux_testing.adapters import read_adapter, read_program, refusal, write_own
from deltamux_trainers import convert

REGISTRY = Registry()
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def grouped() -> BaseModel:
    return BaseModel.from_pretrained(base_directory("qwen2"))


@pytest.fixture(scope="module")
def good(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.read(write_own("lora", base, tmp_path_factory.mktemp("good"), r=4, use_dora=True))


# What the file holds.

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


@pytest.mark.parametrize("expression", ["{}", "^{}$", r".*{}"])
@pytest.mark.parametrize("place", ["model.language_model.layers", "layers", "_orig_mod.model.layers"])
def test_ranks_and_scales_by_pattern_follow_the_names(
    place: str, expression: str, good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    first = base.linears[0].name
    path = first.replace("model.layers", place)
    pattern = expression.format(path if expression == "{}" else re.escape(path))
    tensors = {name.replace("model.model.layers", f"model.{place}"): t for name, t in good.tensors.items()}
    for name, tensor in tensors.items():
        if f"{path}.lora_A" in name or f"{path}.lora_B" in name:
            tensors[name] = tensor[:2] if "lora_A" in name else tensor[:, :2]
    config = {**good.config, "alpha_pattern": {pattern: 64}, "rank_pattern": {pattern: 2}}
    Checkpoint(config, tensors).write(tmp_path / "before")
    convert(tmp_path / "before", tmp_path / "after", model=base_directory("llama"))
    scales = {site: op.scale for site, op in read_program(tmp_path / "after", base) if isinstance(op, LowRank)}
    assert scales.pop(first) == 32
    assert set(scales.values()) == {good.config["lora_alpha"] / 4}


def test_a_missing_tensor_is_named_with_those_that_are_there(good: Checkpoint, base: BaseModel) -> None:
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


def test_an_adapter_for_as_many_key_heads_as_heads_is_named_as_such(grouped: BaseModel) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        front = f"base_model.model.model.layers.{layer}.self_attn.k_proj"
        tensors |= {f"{front}.lora_A.weight": torch.ones(4, 64), f"{front}.lora_B.weight": torch.ones(64, 4)}
    error = refusal({"peft_type": "LORA", "r": 4, "target_modules": ["k_proj"]}, grouped, tensors)
    assert error.reason == "BASE_MISMATCH"
    assert "made for a base without grouped queries; this one has 1 key and value head(s)" in error.message


# Other writers' files, and files that hold no adapter.


def as_mlx(good: Checkpoint, kind: str) -> Checkpoint:
    """Returns a LoRA as MLX-LM keeps it: factors transposed, named by path alone, the scale in place of alpha."""
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in good.tensors.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{path}.{names[f'lora_{part}']}"] = tensor.t().contiguous() if tensor.dim() == 2 else tensor
    scale = good.config["lora_alpha"] / good.config["r"]
    config = {"fine_tune_type": kind, "lora_parameters": {"rank": good.config["r"], "scale": scale}, "num_layers": 2}
    return Checkpoint(config, tensors)


def test_an_adapter_of_mlx_is_read_and_converted_as_the_same_lora(
    good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    mlx = as_mlx(good, "dora")
    expected = read_adapter(good, base)
    mlx.write(tmp_path / "mlx")
    (tmp_path / "mlx" / WEIGHTS).rename(tmp_path / "mlx" / "adapters.safetensors")
    assert convert(tmp_path / "mlx", tmp_path / "peft") == "lora"
    for program in (read_adapter(mlx, base), read_program(tmp_path / "peft", base)):
        for (site, op), (known, same) in zip(program, expected, strict=True):
            assert site == known
            assert op.attributes() == same.attributes()
            assert all(torch.equal(tensor, same.tensors()[name]) for name, tensor in op.tensors().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type: 'full' is not lora or dora: fuse it"),
        ({"lora_parameters": {"rank": 8}}, "scale is None, not a number"),
        ({"lora_parameters": {"scale": 2.0, "rank": "8"}}, "rank is '8', not a positive integer"),
    ],
)
def test_an_adapter_of_mlx_that_is_not_lora_is_refused(
    change: dict[str, Any], words: str, good: Checkpoint, base: BaseModel
) -> None:
    mlx = as_mlx(good, "dora")
    assert words in refusal({**mlx.config, **change}, base, dict(mlx.tensors)).message


@pytest.mark.parametrize("config", [{"lora_rank": 32, "framework": "other"}, {}])
def test_a_config_of_no_method_is_refused_with_its_keys(config: dict[str, Any], base: BaseModel) -> None:
    error = refusal(config, base)
    assert ", ".join(config) in error.message
    assert "Save the adapter with PEFT" in error.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_that_peft_casts_are_cast(dtype: torch.dtype, good: Checkpoint, base: BaseModel, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in good.tensors.items()}
    Checkpoint(good.config, stored).write(tmp_path / "one")
    torch.save(stored, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(good.config)))
    convert(tmp_path, tmp_path / "other")
    for directory in ("one", "other"):
        loaded = Checkpoint.read(tmp_path / directory).tensors
        assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_integers_are_refused_as_codes_without_a_scale(good: Checkpoint, tmp_path: Path) -> None:
    Checkpoint(good.config, {name: tensor.to(torch.int8) for name, tensor in good.tensors.items()}).write(tmp_path)
    with pytest.raises(InvalidAdapterError, match="codes without the scale that they were quantised with"):
        Checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    "tensors", [{}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.empty(0)}]
)
def test_an_empty_file_and_a_damaged_one_have_different_messages(
    tensors: dict[str, torch.Tensor], base: BaseModel, tmp_path: Path
) -> None:
    Checkpoint({"peft_type": "LORA", "r": 4}, tensors).write(tmp_path / "empty")
    with pytest.raises(InvalidAdapterError, match=r"the adapter is empty: .*ZeRO-3") as refused:
        convert(tmp_path / "empty", tmp_path / "out")
    assert refused.value.reason == "EMPTY_ADAPTER"
    assert refusal({"peft_type": "LORA", "r": 4}, base, tensors).reason == "EMPTY_ADAPTER"


NOT_DENSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": torch.Tensor.to_sparse,
    "without values": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("kind", [*NOT_DENSE, "a damaged pickle"])
def test_a_pickle_of_anything_but_dense_tensors_is_refused_in_a_sentence(
    kind: str, good: Checkpoint, tmp_path: Path
) -> None:
    good.write(tmp_path / "source")
    (tmp_path / "source" / WEIGHTS).unlink()
    file = tmp_path / "source" / "adapter_model.bin"
    if kind in NOT_DENSE:
        torch.save({name: NOT_DENSE[kind](tensor) for name, tensor in good.tensors.items()}, file)
    else:
        file.write_bytes(b"abc")
    with pytest.raises(InvalidAdapterError, match=r"adapter_model\.bin (is damaged|holds something other)") as refused:
        convert(tmp_path / "source", tmp_path / "out")
    assert refused.value.reason == "PICKLE"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["run/checkpoint-40/adapter_config.json", "run/b/adapter_config.json"], "folders in it .*: run/b, run/check"),
        (["adapter_config.json", "adapter_model.bin"], "holds adapter_model.bin: run `deltamux convert .* NEW`"),
        (["adapter_config.json", "adapters.safetensors"], "holds adapters.safetensors: run `deltamux convert"),
        (["adapter_config.json", "global_step40/x.pt"], "sharded checkpoint of DeepSpeed"),
        (["config.json", "model.safetensors"], "whole model, which is served by itself"),
        ([], "an adapter is a directory with adapter_config.json and adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("reads", ["upload", "here"])
def test_the_message_for_a_directory_without_an_adapter_names_its_content(
    files: list[str], words: str, reads: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(InvalidAdapterError, match=words) as refused:
        upload_messages("tenants/a/adapters/b", tmp_path) if reads == "upload" else Checkpoint.read(tmp_path)
    assert refused.value.reason == "MISSING_FILE"


def test_a_checkpoint_of_a_trainer_is_an_adapter_with_further_files(
    good: Checkpoint, base: BaseModel, tmp_path: Path
) -> None:
    good.write(tmp_path / "store")
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (folder / name).symlink_to(tmp_path / "store" / name)
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x04")
    assert len(read_program(folder, base).placements) == len(read_adapter(good, base).placements)

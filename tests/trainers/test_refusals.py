"""Refusals in one sentence: of bad options, and of bases that are not whole decoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_utils import SchedulerType

from deltamux.cli import main
from deltamux.conformance.bases import save_base
from deltamux.errors import FailedPreconditionError, InvalidConfigError
from deltamux.options import declared
from deltamux_trainers import EvaluateOptions, TrainOptions, compress, evaluate, merge, train
from deltamux_trainers.options import SCHEDULERS

BAD_OPTIONS = [
    ("--scheduler nope", "scheduler must be one of linear, cosine,"),
    ("--scheduler cosine_with_min_lr", "scheduler must be one of"),
    ("--optimizer sgd", "optimizer must be one of adamw"),
    ("--learning-rate -1", "learning_rate must be a number above 0"),
    ("--learning-rate nan", "learning_rate must be a number above 0"),
    ("--max-steps -5", "max_steps must be a whole number from 1 to "),
    ("--max-steps 0", "max_steps must be a whole number from 1 to "),
    ("--epochs -1", "epochs must be a number above 0"),
    ("--epochs inf", "epochs must be a number above 0"),
    ("--warmup-ratio 3", "warmup_ratio must be a number of at least 0 and below 1"),
    ("--weight-decay -0.1", "weight_decay must be a number from 0 to "),
    ("--batch-size 0", "batch_size must be a whole number from 1 to "),
    ("--gradient-accumulation 0", "gradient_accumulation must be a whole number"),
    ("--max-length 1", "max_length must be a whole number from 2 to "),
    ("--log-steps 0", "log_steps must be a whole number"),
    ("--eval-steps 0", "eval_steps must be a whole number"),
    ("--seed -1", "seed must be a whole number from 0 to "),
    ("--eval-fraction 1", "eval_fraction must be a number of at least 0 and below 1"),
    ("--eval-fraction 0.001", "eval_fraction 0.001 of 64 rows is less than one row"),
    ("--eval-fraction 0.5 --patience 0", "patience must be a whole number from 1 to "),
    ("--patience 2", "patience 2 needs data to evaluate on"),
    ("--scheduler reduce_lr_on_plateau", "needs data to evaluate on"),
    ("--device tpu", "device is auto, cpu, cuda or cuda:N"),
    ("--device cuda:99", "device cuda:99 is not there"),
    ("--config {tmp}/missing.yaml", "missing.yaml cannot be read: No such file"),
    ("--config {tmp}", "cannot be read: Is a directory"),
    ("--config {tmp}/broken.yaml", "broken.yaml is not valid YAML in line 2"),
    ("--config {tmp}/list.yaml", "list.yaml is not a mapping"),
    ("--config {tmp}/unknown.yaml", "no option 'rank'; it has:"),
    ("--set r", "write key=value"),
    ("--set r=[1", "is not valid YAML"),
    ("--set no_such=1", "no option 'no_such'"),
    ("--set no_such=false", "no option 'no_such'"),
    ("--set peft_type=LOHA", "of peft_type 'LOHA', and method 'lora' of 'LORA'"),
    ("--method prompt --set num_virtual_tokens=300", "num_virtual_tokens 300 leaves no room"),
    ("--method none", "unknown method 'none'; installed:"),
    ("--data {tmp}/missing.jsonl", "missing.jsonl cannot be read"),
    ("--output {tmp}/list.yaml", "list.yaml is not a directory"),
    ("--model {tmp}/no-model", "no-model' cannot be read"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD_OPTIONS, ids=[given for given, _ in BAD_OPTIONS])
def test_a_bad_option_is_a_sentence_before_the_base_is_loaded(
    given: str,
    sentence: str,
    directory: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltamux_trainers.training.train.load_model", _must_not_run, raising=True)
    (tmp_path / "broken.yaml").write_text("r: 4\nlora_alpha: 1: 2\nbias: none\n")
    (tmp_path / "list.yaml").write_text("- r\n")
    (tmp_path / "unknown.yaml").write_text("rank: 4\n")
    whole = {"--method": "lora", "--model": directory, "--data": data, "--output": tmp_path / "out"}
    words = given.format(tmp=tmp_path).split()
    arguments = [str(word) for option, value in whole.items() if option not in words for word in (option, value)]
    assert main(["train", *arguments, *words]) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err.splitlines()[0]
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def _must_not_run(*arguments: Any) -> None:
    raise AssertionError("the base is loaded")


@pytest.mark.parametrize("kind", [TrainOptions, EvaluateOptions], ids=["train", "evaluate"])
@pytest.mark.parametrize("value", [-1, 1e30, float("nan"), "4", True])
def test_every_number_has_bounds(kind: type[Any], value: Any) -> None:
    given = {"model": "", "data": Path(), **({"method": "lora", "output": Path()} if kind is TrainOptions else {})}
    numbers = [name for name, each in declared(kind).items() if each.kind in (int, float)]
    assert "batch_size" in numbers
    for name in numbers:
        with pytest.raises(InvalidConfigError, match=f"^option {name} must be a"):
            kind(**given, **{name: value})


def test_the_schedules_are_those_of_transformers_that_need_no_options() -> None:
    assert set(SCHEDULERS) <= {kind.value for kind in SchedulerType}


@pytest.mark.slow
def test_stdout_is_one_json_document_and_progress_goes_to_stderr(
    directory: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "lora", "--model", str(directory), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["train", *given, "--max-steps", "2", "--log-steps", "1", "--eval-fraction", "0.5", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == 2
    assert "step 1/2: loss " in printed.err
    assert "step 2/2: evaluation loss " in printed.err
    assert main(["evaluate", "--model", str(directory), "--data", str(data), "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


REFUSED = {
    "encoder": "is an encoder:",
    "translator": "is an encoder with a decoder:",
    "headless": "lack lm_head.weight",
    "classifier": "lack lm_head.weight",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bases that transformers would load as causal models, weights of the output head made up."""
    root = tmp_path_factory.mktemp("bases")
    whole = save_base(root / "whole", "llama")
    small = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(small).save_pretrained(root / "encoder")  # type: ignore[no-untyped-call]  # transformers leaves it so
    LlamaModel.from_pretrained(whole).save_pretrained(root / "headless")
    LlamaForSequenceClassification.from_pretrained(whole).save_pretrained(root / "classifier")
    sizes: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **sizes)).save_pretrained(root / "translator")
    for name in REFUSED:
        AutoTokenizer.from_pretrained(whole).save_pretrained(root / name)
    return lambda name: root / name


WORK: dict[str, Callable[[str, Path, Path], object]] = {
    "train": lambda model, data, output: train(TrainOptions("lora", model, data, output, quiet=True)),
    "evaluate": lambda model, data, output: evaluate(EvaluateOptions(model, data)),
    "merge": lambda model, data, output: merge(model, data, output),
    "compress": lambda model, data, output: compress(model, data, output),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("base", REFUSED)
def test_a_base_that_is_not_a_whole_decoder_is_refused(
    base: str, work: str, bases: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FailedPreconditionError, match=REFUSED[base]):
        WORK[work](str(bases(base)), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_saved_without_its_head_is_whole_where_the_head_is_tied(data: Path, tmp_path: Path) -> None:
    from transformers import GPT2Model

    directory = save_base(tmp_path / "whole", "gpt2")
    GPT2Model.from_pretrained(directory).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "headless")
    whole, headless = (evaluate(EvaluateOptions(str(tmp_path / n), data, limit=4)) for n in ("whole", "headless"))
    assert headless.loss == pytest.approx(whole.loss, abs=1e-6)


@pytest.mark.parametrize("differ", [True, False])
def test_a_head_that_is_not_the_embedding_which_the_config_ties_it_to_is_refused(
    differ: bool, data: Path, directory: Path, tmp_path: Path
) -> None:
    """transformers keeps both, and the engine one: the base would be served otherwise than trained."""
    base = shutil.copytree(directory, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(base / "model.safetensors")
    if not differ:
        same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(same, base / "model.safetensors", {"format": "pt"})
        assert evaluate(EvaluateOptions(str(base), data, limit=2)).rows == 2
        return
    with pytest.raises(
        FailedPreconditionError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"
    ) as refused:
        train(TrainOptions("lora", str(base), data, tmp_path / "out", quiet=True))
    assert refused.value.reason == "BASE_AMBIGUOUS"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda base: _cut(base / "model.safetensors"),
        r"model\.safetensors, of the base model, cannot be read",
    ),
    "a shard missing": (lambda base: (base / "model.safetensors").rename(base / "x"), "is missing"),
    "an index of nothing": (lambda base: (base / INDEX).write_text("[]"), "is not an index of weights"),
    "generation options": (
        lambda base: (base / "generation_config.json").write_text("[]"),
        "cannot be loaded",
    ),
}
INDEX = "model.safetensors.index.json"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20000])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_base_is_refused_by_name_and_file(damage: str, data: Path, directory: Path, tmp_path: Path) -> None:
    base = shutil.copytree(directory, tmp_path / "base")
    if damage == "a shard missing":
        names = load_file(base / "model.safetensors")
        (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    change, problem = DAMAGE[damage]
    change(base)
    with pytest.raises(FailedPreconditionError, match=problem) as refused:
        train(TrainOptions("lora", str(base), data, tmp_path / "out", quiet=True))
    assert refused.value.reason in ("BASE_DAMAGED", "BASE_NOT_LOADABLE")
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_tokenizer_is_named(data: Path, directory: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(directory / file)
    with pytest.raises(FailedPreconditionError, match="the tokenizer of base model"):
        train(TrainOptions("lora", str(tmp_path), data, tmp_path / "out", quiet=True))

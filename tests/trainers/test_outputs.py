"""The output of training: files of others are neither replaced nor removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamux.errors import FailedPreconditionError
from deltamux_testing.training import options
from deltamux_trainers import EvaluateOptions, convert, evaluate, merge, train


def run(directory: Path, data: Path, output: Path) -> None:
    train(options("lora", directory, data, output))


@pytest.fixture(scope="module")
def adapter(directory: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter") / "of"
    run(directory, data, output)
    return output


TAKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model": (lambda output: (output / "config.json").write_text("{}"), "holds a model"),
    "weights of an adapter": (
        lambda output: (output / "adapter_model.safetensors").write_text("mine"),
        "holds an adapter already",
    ),
    "a file where checkpoints go": (
        lambda output: (output / "checkpoints").write_text("mine"),
        "checkpoints is a file",
    ),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_an_output_that_the_adapter_does_not_go_with_is_refused_before_any_work(
    taken: str, directory: Path, data: Path, tmp_path: Path
) -> None:
    TAKEN[taken][0](tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FailedPreconditionError, match=TAKEN[taken][1]) as refused:
        run(directory, data, tmp_path)
    assert refused.value.reason == "OUTPUT_EXISTS"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_files_of_others_in_the_output_stay(directory: Path, data: Path, tmp_path: Path) -> None:
    """Also those in folders of the names that training once took for its own."""
    others = [tmp_path / name / "mine.txt" for name in ("checkpoints", "writing", "notes")]
    for file in others:
        file.parent.mkdir()
        file.write_text("mine")
    run(directory, data, tmp_path)
    assert [file.read_text() for file in others] == ["mine"] * len(others)
    assert (tmp_path / "adapter_config.json").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_what_a_killed_write_has_left_does_not_hinder_the_next(directory: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / ".writing").mkdir()
    for file in (".writing/adapter_config.json", "train_report.json", "adapter_model.safetensors"):
        (tmp_path / file).write_text("half")
    run(directory, data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "train_report.json",
    }


@pytest.mark.slow
def test_a_base_with_an_adapter_next_to_its_weights_is_refused(
    directory: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    """transformers would add it to the base, and the server, which adds adapters itself, would not."""
    model = shutil.copytree(directory, tmp_path / "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, model)
    work: list[Callable[[], object]] = [
        lambda: run(model, data, tmp_path / "out"),
        lambda: evaluate(EvaluateOptions(str(model), data, limit=4)),
        lambda: merge(str(model), adapter, tmp_path / "out"),
    ]
    for each in work:
        with pytest.raises(
            FailedPreconditionError, match=r"holds an adapter_config\.json next to its weights"
        ) as refused:
            each()
        assert refused.value.reason == "BASE_HOLDS_ADAPTER"
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_as_output_is_followed(is_there: bool, adapter: Path, tmp_path: Path) -> None:
    if is_there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}

"""Training data: JSONL files, the border of prompt and completion, and rows without a token to learn."""

from __future__ import annotations

import gzip
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from deltamux.cli import main
from deltamux.conformance.bases import save_base
from deltamux.errors import InvalidArgumentError, InvalidConfigError
from deltamux.prompts import encode_text
from deltamux_testing.chat_templates import SHAPES, byte_level, decoded, metaspace
from deltamux_trainers import EvaluateOptions, TrainOptions, evaluate, train
from deltamux_trainers.data.completions import eos_token_ids
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.rows import MAX_LINE_BYTES, PromptRow, TextRow, read_rows
from deltamux_trainers.data.tokenization import IGNORE_INDEX, RowTokenizer, TokenizedSequence

BYTES = byte_level(["</s>"], eos="</s>", bos=None, chat_template=None)
WITH_BOS = byte_level(["<s>", "</s>"], eos="</s>", bos="<s>", chat_template=None)
SPACES = metaspace(["<s>", "</s>"], eos="</s>", bos="<s>", chat_template=None)
PREFIXED = byte_level(["</s>"], eos="</s>", bos=None, chat_template=None, add_prefix_space=True)
FIRST = metaspace(["<s>", "</s>"], eos="</s>", bos=None, chat_template=None, first_alone=True)
TOKENIZERS = {
    "byte-level": BYTES,
    "byte-level with bos": WITH_BOS,
    "byte-level with a space in front": PREFIXED,
    "metaspace": SPACES,
    "metaspace, first": FIRST,
}


def encoder(tokenizer: Any, max_length: int = 1 << 20) -> RowTokenizer:
    return RowTokenizer(tokenizer, frozenset([tokenizer.eos_token_id]), max_length)


def written(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def labels_of(row: TokenizedSequence) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


# Where a prompt ends.

PIECES = st.sampled_from(["answer", "yes", "no", "(", ")", ": ", " ", "\n", "é", "e\u0301", "▁", "👍", "the"])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.lists(PIECES, min_size=1, max_size=5).map("".join), completion=st.lists(PIECES, max_size=4).map("".join)
)
def test_a_completion_is_learnt_after_the_prompt_that_the_server_sends(name: str, prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = encoder(tokenizer)(PromptRow("f:1", 1, prompt, completion)).sequences
    sent = encode_text(tokenizer, prompt)
    assert list(row.input_ids[: len(sent)]) == sent
    assert row.labels == (*[IGNORE_INDEX] * len(sent), *row.input_ids[len(sent) :])
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row.input_ids[len(sent) : -1]
    # A decoder of ▁ makes a space of every one, and drops the first.
    opening = tokenizer.bos_token or ""
    text = (prompt + completion).replace("▁", " ") if "metaspace" in name else prompt + completion
    assert decoded(tokenizer, row.input_ids[:-1]).removeprefix(opening).lstrip() == text.lstrip()


@pytest.mark.parametrize(
    ("prompt", "completion", "learnt"),
    [("answer: (", "yes", "yes</s>"), ("answer:", " yes", " yes</s>"), ("answer: ", "yes", "yes</s>")],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_space_is_learnt_that_the_completion_does_not_have(
    name: str, prompt: str, completion: str, learnt: str
) -> None:
    tokenizer = TOKENIZERS[name]
    (row,) = encoder(tokenizer)(PromptRow("f:1", 1, prompt, completion)).sequences
    pieces = tokenizer.convert_ids_to_tokens(labels_of(row))
    assert "".join(pieces).replace("▁", " ").replace("Ġ", " ") == learnt


def test_a_tokenizer_that_closes_every_prompt_is_followed_as_the_server_does() -> None:
    closing = byte_level(["</s>"], eos="</s>", bos=None, chat_template=None)
    processor = processors.TemplateProcessing("$A </s>", None, [("</s>", closing.get_vocab()["</s>"])])
    closing.backend_tokenizer.post_processor = processor
    (row,) = encoder(closing)(PromptRow("f:1", 1, "answer:", " yes")).sequences
    assert decoded(closing, row.input_ids) == "answer:</s> yes</s>"
    assert decoded(closing, labels_of(row)) == " yes</s>"


@pytest.mark.parametrize("completion", ["yes", "yes</s>", "yes</s>\n"])
def test_the_end_token_is_learnt_once_after_a_completion(completion: str) -> None:
    (row,) = encoder(BYTES)(PromptRow("f:1", 1, "answer: ", completion)).sequences
    assert decoded(BYTES, labels_of(row)) == "yes</s>"


@pytest.mark.parametrize("completion", ["yes</s>no", "</s>yes", "yes</s> no</s>"])
def test_a_completion_that_goes_on_after_an_end_token_is_refused(completion: str) -> None:
    with pytest.raises(InvalidArgumentError, match="f:1 has '</s>' within completion: the server stops") as refused:
        encoder(BYTES)(PromptRow("f:1", 1, "answer: ", completion))
    assert refused.value.metadata["field"] == "completion"


@pytest.mark.parametrize(("text", "ends"), [("what is it", "it</s>"), ("it</s>", "it</s>"), ("it</s>\n", "it</s>\n")])
def test_the_end_token_is_learnt_once_after_a_text(text: str, ends: str) -> None:
    (row,) = encoder(BYTES)(TextRow("f:1", 1, text)).sequences
    assert decoded(BYTES, row.input_ids).endswith(ends)
    assert row.input_ids.count(BYTES.eos_token_id) == 1
    assert row.labels == (IGNORE_INDEX, *row.input_ids[1:])


def test_the_end_tokens_are_the_tokenizers_and_those_of_the_generation_config(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert eos_token_ids(str(tmp_path), BYTES) == {7, 8, BYTES.eos_token_id}
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    assert eos_token_ids(str(tmp_path), BYTES) == {9, BYTES.eos_token_id}


# Files.

SEPARATORS = "a\u2028b\u2029c\u0085d\x0ce\x0bf\x1cg"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_a_line_feed_ends_a_row(ending: str, mark: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": SEPARATORS}, ensure_ascii=False), "", '{"prompt": "a", "completion": "b"}']
    file.write_bytes((mark + ending.join(rows)).encode())
    texts, prompts = read_rows(file)
    assert isinstance(texts, TextRow)
    assert texts.text == SEPARATORS
    assert isinstance(prompts, PromptRow)
    assert (prompts.line, prompts.where) == (3, f"{file}:3")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (gzip.compress(b'{"text": "a"}\n', mtime=0), "is gzip data: unpack it first"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"PAR1....", "is a Parquet file"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r":2 is not UTF-8 \(byte 0xe9 at 13\): save the file as UTF-8"),
        (b'[{"text": "a"}]\n', "like a JSON array: one object per line is needed"),
        (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "like a JSON array"),
        (b'{"text": "a"}\n[1]\n', ":2 is not a JSON object"),
        (b'{"text": "a"}\n{"text": "b', ":2 is not valid JSON: Unterminated string"),
        (b'{\n"text": "a"\n}\n', ":1 is not valid JSON: .* a row is one object on one line"),
        (b'{"text": "a"}{"text": "b"}\n', ":1 is not valid JSON: Extra data"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}\n', ":1 is longer than 16 MiB"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ":1 is nested too deeply"),
        (b'{"text": "a", "text": "b"}\n', ":1 is not valid JSON: the key 'text' is there twice"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", ":1 is not valid JSON"),
        (b'{"text": "\\ud800"}\n', ":1 has a lone surrogate in text"),
        (b'{"messages": [{"role": "user", "content": "a", "x": {"y": "\\uDBFF"}}]}\n', r"in messages\[0\].x.y"),
        (b'{"\\ud800": "a"}\n', ":1 has a lone surrogate in a key"),
        (b'{"text": "a", "prompt": "b", "completion": "c"}\n', ":1 has text and prompt: a row has one of"),
        (b'{"text": "a", "messages": []}\n', ":1 has text and messages"),
        (b'{"prompt": "a"}\n', ":1 is not a row: completion is missing"),
        (b'{"prompt": ["a"], "completion": "b"}\n', ":1 is not a row: prompt is a list"),
        (b'{"prompt": "a", "completion": null}\n', ":1 is not a row: completion is missing"),
        (b'{"completion": "a"}\n', ":1 has neither text, nor prompt and completion, nor messages"),
        (b'{"instruction": "a", "output": "b"}\n', r":1 has neither .* \(its keys: instruction, output\)"),
        (b'{"messages": "a"}\n', ":1 is not a row: messages is a text, and a list is needed"),
        (b'{"text": 7}\n', ":1 is not a row: text is a number"),
        (b'{"prompt": "a", "completion": "b", "tools": [{}]}\n', ":1 has tools, which Generate cannot send"),
        (b"{}\n", ":1 has neither"),
    ],
)
def test_a_file_that_is_not_jsonl_is_refused_in_a_sentence(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=problem) as refused:
        read_rows(file)
    assert refused.value.reason == "INVALID_DATA"
    assert refused.value.metadata["file"] == str(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_rows(tmp_path / name)


def test_a_pipe_is_refused_because_it_can_be_read_only_once(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "rows.jsonl")
    with pytest.raises(InvalidArgumentError, match="is not a file but a pipe or a device") as refused:
        read_rows(pipe)
    assert refused.value.reason == "INVALID_DATA"


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot JSON\n')
    assert [row.line for row in read_rows(file, limit=2)] == [1, 2]


# Rows that teach nothing, and rows that are cut.

LONG: dict[str, Any] = {"prompt": "what is it? " * 9, "completion": "yes"}
SHORT: dict[str, Any] = {"prompt": "it: ", "completion": "yes"}


def test_rows_without_learnt_tokens_are_left_out_and_listed_by_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path, LONG, SHORT, LONG, {"text": ""}, {"prompt": "", "completion": ""})
    with caplog.at_level(logging.WARNING):
        data = load_dataset(file, encoder(BYTES, 16))
    assert [row.line for row in data.rows] == [2]
    assert data.untaught == (1, 3, 4, 5)
    assert "without a token to learn, and left out, their prompts fill a sequence of 16 tokens" in caplog.text
    assert "4 rows (line 1, 3, 4, 5)" in caplog.text


def test_rows_that_are_cut_are_listed_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, SHORT, {"prompt": "it: ", "completion": "yes and no " * 20})
    with caplog.at_level(logging.WARNING):
        data = load_dataset(file, encoder(BYTES, 16))
    assert data.truncated == (2,)
    assert len(data.sequences[1].input_ids) == 16
    assert BYTES.eos_token_id not in data.sequences[1].labels, "what is cut has no end"
    assert "cut to 16 tokens: 1 row (line 2)" in caplog.text


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([LONG, LONG], r"no row has a token to learn, their prompts fill .* 16 tokens: 2 rows \(line 1, 2\)"),
        ([{"text": ""}], r"no row has a token to learn, they are empty or have weight 0: 1 row \(line 1\)"),
        ([{"prompt": "", "completion": ""}] * 7, "line 1, 2, 3, 4, 5 and 2 more"),
    ],
)
def test_a_file_without_learnt_tokens_is_refused(rows: list[object], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        load_dataset(written(tmp_path, *rows), encoder(BYTES, 16))


def test_turns_beyond_the_longest_sequence_are_left_out(tmp_path: Path) -> None:
    turns = [("user", "what?"), ("assistant", "yes"), ("user", "again? " * 30), ("assistant", "no")]
    file = written(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    for name in ("chatml", "qwen3"):
        shape = SHAPES[name]
        data = load_dataset(file, RowTokenizer(shape.tokenizer, shape.ends, 80))
        assert data.truncated == (1,)
        assert [decoded(shape.tokenizer, labels_of(row)) for row in data.sequences] == [
            shape.answer.format("yes<|im_end|>")
        ]


def test_a_share_to_hold_out_takes_rows_whole(tmp_path: Path) -> None:
    shape = SHAPES["qwen3"]
    turns = [("user", "what?"), ("assistant", "yes"), ("user", "again?"), ("assistant", "no")]
    rows = [[("user", f"row {n}"), *turns[1:]] for n in range(8)]
    file = written(tmp_path, *({"messages": [{"role": r, "content": c} for r, c in row]} for row in rows))
    kept, held_out = load_dataset(file, RowTokenizer(shape.tokenizer, shape.ends)).split(0.25, seed=0)
    numbers = [{decoded(shape.tokenizer, e.input_ids).split("row ")[1][0] for e in side} for side in (kept, held_out)]
    assert [len(side) for side in (kept, held_out)] == [12, 4]
    assert not numbers[0] & numbers[1]


def test_a_token_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r":1 has the token \d+, and the base model has 100"):
        load_dataset(written(tmp_path, SHORT), replace(encoder(BYTES), vocab_size=100))


def test_an_evaluation_counts_what_it_cuts_and_leaves_out(directory: Path, tmp_path: Path) -> None:
    data = written(tmp_path, SHORT, LONG, {"prompt": "it: ", "completion": "yes and no " * 20})
    done = evaluate(EvaluateOptions(str(directory), data, max_length=16))
    assert (done.rows, done.untaught_rows, done.truncated_rows) == (2, 1, 1)
    assert done.perplexity > 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), [("lora", {}), ("prompt", {"num_virtual_tokens": 8})])
def test_no_sequence_with_its_virtual_tokens_is_longer_than_the_bases_context(
    method: str, config: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "gpt2")  # 256 learnt positions: one more would be an error
    data = written(tmp_path, SHORT, {"prompt": "it: ", "completion": "yes and no " * 60})
    options = TrainOptions(method, str(base), data, tmp_path / "out", config=config, max_steps=1, quiet=True)
    assert train(options).truncated_rows == 1
    assert evaluate(EvaluateOptions(str(base), data, tmp_path / "out")).truncated_rows == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(b"{}", mtime=0), "is gzip data"),
        (b'{"text": "caf\xe9"}\n', ":1 is not UTF-8"),
        (b'[{"text": "a"}]', "like a JSON array"),
        (b'{"text": "a"}\n{"text": "b', ":2 is not valid JSON"),
        (b'{"text": ""}\n', "no row has a token to learn"),
        (b'{"messages": []}\n', "no message of the assistant"),
    ],
)
def test_the_commands_refuse_data_in_a_sentence_before_the_weights_are_loaded(
    command: str,
    content: bytes,
    sentence: str,
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def must_not_run(*arguments: object) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(
        f"deltamux_trainers.{'training.train' if command == 'train' else 'tools.evaluate'}.load_model", must_not_run
    )
    (file := tmp_path / "rows.jsonl").write_bytes(content)
    words = ["--method", "lora", "--output", str(tmp_path / "out")] if command == "train" else []
    assert main([command, "--model", str(directory), "--data", str(file), *words]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {file}")
    assert sentence in printed.splitlines()[0]
    assert "INVALID_DATA" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--max-length", "16"], ["--turns", "last", "--max-length", "16"]])
def test_the_command_evaluates_within_a_length_and_reports_cut_rows(
    words: list[str], directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, SHORT, LONG)
    assert main(["evaluate", "--model", str(directory), "--data", str(data), "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["untaught_rows"] == 1


def test_data_check_counts_and_shows_what_would_be_learnt(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "data",
        "check",
        "--model",
        str(directory),
        "--data",
        str(written(tmp_path, SHORT, LONG, {"text": "it is"})),
    ]
    assert main([*words, "--max-length", "16", "--show", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["untaught_rows"], report["truncated_rows"]) == (2, 1, 0)
    assert report["examples"] == ["it: [[yes</s>]]", "i[[t is</s>]]"]
    assert report["learnt_tokens"] == 9
    assert main([*words, "--show", "1"]) == 0
    assert capsys.readouterr().out.endswith("\n\nit: [[yes</s>]]\n")


def test_exact_matches_need_prompts(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=":2 has no prompt and completion, which exact matches need"):
        evaluate(EvaluateOptions(str(directory), written(tmp_path, SHORT, {"text": "it is"}), generate=True))


def test_the_turns_are_all_or_the_last(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="turns must be one of all, last, not 'first'"):
        EvaluateOptions("base", tmp_path / "data.jsonl", turns="first")

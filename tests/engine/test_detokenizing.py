"""The text of generated tokens: never the prompt's, the same as decoding them all, at a cost that does not grow."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from deltamux.engine.base import SamplingOptions
from deltamux.engine.vllm.frontend.detokenizing import MAX_PENDING, BoundedDetokenizer
from deltamux.engine.vllm.frontend.engine import VLLMEngine

END = 256


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte, its id the byte, and a special one."""
    names = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]  # transformers
    made = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)  # type: ignore[no-untyped-call]  # transformers


def words() -> PreTrainedTokenizerFast:
    """Words that begin with a space, which is dropped at the beginning of a text, and bytes for what is no word."""
    vocab = {"▁a": 0, "▁to": 1, "▁be": 2, "s": 3, "<unk>": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)  # type: ignore[no-untyped-call]  # transformers


def detokenizer(tokenizer: PreTrainedTokenizerFast, prompt: list[int], **sampling: Any) -> BoundedDetokenizer:
    request = EngineCoreRequest("request", prompt, None, SamplingParams(**sampling), None, 0.0, None, None, None)
    return BoundedDetokenizer(tokenizer, request)


def pieces(made: BoundedDetokenizer, tokens: list[int]) -> str:
    return "".join(made.decode_next(token) for token in tokens)


@pytest.mark.parametrize("end", ["é".encode()[:1], "😀".encode()[:3], "\ufffd".encode(), b"\x80" * 100])
def test_a_prompt_that_ends_within_a_character_is_no_part_of_the_text(end: bytes) -> None:
    made = detokenizer(byte_level(), [*b"a secret ", *end])
    assert pieces(made, [*b"answer"]) == "answer"


def test_after_such_a_prompt_a_word_keeps_the_space_that_it_begins_with() -> None:
    assert pieces(detokenizer(words(), [1, 5 + 0xC3]), [2, 3]) == " bes"


def test_after_another_prompt_the_text_is_what_decoding_both_adds() -> None:
    assert pieces(detokenizer(words(), [1] * 200), [2, 3]) == " bes"
    assert pieces(detokenizer(words(), []), [2, 3]) == "bes"


@pytest.mark.parametrize("seed", range(20))
def test_of_any_bytes_the_text_is_that_of_all_of_them(seed: int) -> None:
    draw = random.Random(seed)
    kinds = ["é".encode(), "漢".encode(), "😀".encode(), b"\x80", b"\xf0\x9f", b"\xe6", b"\xc3", b"\xed\xa0\x80"]
    weights = [draw.random() ** 4 for _ in kinds]
    tokens = [*b"".join(draw.choices(kinds, weights, k=300)), *b"."]
    assert pieces(detokenizer(byte_level(), [*b"x"]), tokens) == bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("token", [0x80, END], ids=["bytes that are no character", "special tokens"])
def test_what_makes_no_text_is_not_decoded_over_and_over(token: int) -> None:
    made = detokenizer(byte_level(), [*b"x"])
    for count in range(1, 2000):
        made.decode_next(token)
        assert len(made._pending) < MAX_PENDING, count
    assert pieces(made, [*"é.".encode()]).endswith("é.")


@pytest.mark.parametrize("stop", [(), ("\n",)], ids=["no stop string", "a stop string that the prompt holds"])
async def test_an_engines_answer_to_a_prompt_cut_within_a_character_is_the_answer_alone(
    engine: VLLMEngine, stop: tuple[str, ...]
) -> None:
    sampling = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True, stop=stop, logit_bias={70: 100.0})
    prompt = "The user wrote:\n\ufffd"
    chunks = [c async for c in engine.generate(prompt, sampling, None, request_id=f"cut {len(stop)}", stream=False)]
    text = "".join(chunk.text for chunk in chunks)
    assert len(text) == 8
    assert len(set(text)) == 1

"""Pre-training of the demo's base model: ``python -m deltamux_trainers.demo.base --output DIR``.

The model is a Llama of 3.5 million parameters, trained on three public-domain novels and, in the same batches, on the
skills of `skills.py`. About 15 minutes on two CPU cores; the same seed on the same machine gives the same weights.
"""

import argparse
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltamux_trainers.demo.skills import dialogue
from deltamux_trainers.demo.tokenizer import train_tokenizer

ASSETS = files("deltamux_trainers.demo") / "assets"
BASE_MODEL = ASSETS / "base"
IGNORE_INDEX = -100  # the label that the loss leaves out


@dataclass(frozen=True)
class Recipe:
    """All that determines the base. Head size 32 is the smallest that vLLM's CPU attention takes."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    steps: int = 1500
    batch_size: int = 24
    length: int = 192
    text_share: float = 0.35  # of the rows; the others hold dialogues
    learning_rate: float = 4e-3
    warmup: int = 60
    threads: int = 2


def paragraphs() -> list[str]:
    """Returns the novels' paragraphs; assets/README.md has their sources."""
    text = lzma.decompress((ASSETS / "corpus.txt.xz").read_bytes()).decode("utf-8")
    return [line for line in text.splitlines() if line]


def config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (tokens, labels) of plain text, each row from the beginning of a paragraph; every token is learnt."""
    rng = Random(f"{recipe.seed} text")
    encoded = [tokenizer.encode(f"{paragraph}\n") for paragraph in paragraphs()]
    while True:
        row: list[int] = []
        for tokens in islice(encoded, rng.randrange(len(encoded) - 50), None):
            row += tokens
            if len(row) >= recipe.length:
                break
        yield row, row


def dialogue_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (tokens, labels) of whole dialogues packed one after another; only replies are learnt."""
    rng = Random(f"{recipe.seed} dialogues")
    row: list[int] = []
    labels: list[int] = []
    while True:
        encoded: Any = tokenizer.apply_chat_template(dialogue(rng), return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = encoded["input_ids"], encoded["assistant_masks"]
        if len(row) + len(tokens) > recipe.length:
            yield row, labels
            row, labels = [], []
        row = row + tokens
        labels = labels + [t if learnt else IGNORE_INDEX for t, learnt in zip(tokens, mask, strict=True)]


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens, labels), both int64 [batch, length]."""
    texts, dialogues = text_rows(recipe, tokenizer), dialogue_rows(recipe, tokenizer)
    of_text = round(recipe.batch_size * recipe.text_share)
    while True:
        rows = [*islice(texts, of_text), *islice(dialogues, recipe.batch_size - of_text)]
        yield (
            torch.tensor([padded(tokens, recipe.length, tokenizer.pad_token_id) for tokens, _ in rows]),
            torch.tensor([padded(labels, recipe.length, IGNORE_INDEX) for _, labels in rows]),
        )


def padded(values: list[int], length: int, filler: int) -> list[int]:
    return values[:length] + [filler] * (length - len(values))


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for the embedding and the norms: fewer steps than AdamW alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def rate(step: int, recipe: Recipe) -> float:
    """Returns the factor of the learning rate: linear warm-up, then a cosine down to nothing."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def pretrain(recipe: Recipe) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns the trained model (float32) and its tokenizer."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    rng = Random(f"{recipe.seed} tokenizer")
    spoken = (message["content"] for _ in range(4000) for message in dialogue(rng))
    tokenizer = train_tokenizer([*paragraphs(), *spoken], recipe.vocab_size)
    made = LlamaForCausalLM(config(recipe, tokenizer))  # type: ignore[no-untyped-call]  # transformers leaves it so
    model: LlamaForCausalLM = made
    used = optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: rate(step, recipe)) for each in used]
    progress = tqdm(islice(batches(recipe, tokenizer), recipe.steps), total=recipe.steps, desc="pre-training")
    for tokens, labels in progress:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(used, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes model (bfloat16 safetensors) and tokenizer as Hugging Face's files."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deltamux_trainers.demo.base", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=Recipe.threads, help="CPU threads")
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed, steps=options.steps, threads=options.threads)
    save(*pretrain(recipe), options.output)


if __name__ == "__main__":
    main()

"""What training the methods of whole weights costs as compared with a plain fine-tuning loop: speed and peak memory.

    python -m benchmarks.studies.tuning [--device cuda] [--output tuning.json]     (in tests/)

Both train the same small Llama on the same rows with torch's AdamW, clipping and a linear schedule, each run in a
process of its own, alternating. A ratio of speed above 1, and of memory below 1, is better than the plain loop. Where
other processes are busy, compare the processor's time (with OMP_NUM_THREADS=1, so that no thread spins).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

WAYS = ("plain", "full")
WARM_STEPS = 2
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}


class Moment(NamedTuple):
    """Seconds by the clock, and of the processor's time that the process had."""

    wall: float
    processor: float

    def since(self, begun: Moment) -> Moment:
        return Moment(self.wall - begun.wall, self.processor - begun.processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(_run(arguments)))
        return
    with tempfile.TemporaryDirectory() as place:
        _prepare(Path(place), arguments)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                runs[way].append(_in_process(way, place))
    report = _report(runs)
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _in_process(way: str, place: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.studies.tuning", *sys.argv[1:], "--way", way, "--place", place]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _report(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the medians of each way, and the ratios of ours to the plain loop's."""
    medians = {
        way: {name: statistics.median(run[name] for run in found) for name in found[0]} for way, found in runs.items()
    }
    plain, ours = medians["plain"], medians["full"]
    return {
        "torch": torch.__version__,
        "runs": medians,
        "speed_ratio": plain["step_seconds"] / ours["step_seconds"],
        "processor_ratio": plain["step_processor_seconds"] / ours["step_processor_seconds"],
        "memory_ratio": ours["peak_mib"] / plain["peak_mib"],
        "loss_difference": abs(plain["loss"] - ours["loss"]),
    }


def _prepare(place: Path, arguments: argparse.Namespace) -> None:
    """Writes the base, and rows of random tokens, all of one length."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from deltamux_trainers.demo.base import BASE_MODEL

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_MODEL)
    given: dict[str, Any] = {**SIZES, **heads, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    model: Any = LlamaForCausalLM(LlamaConfig(**given))  # type: ignore[no-untyped-call]  # transformers leaves it so
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    words = [word for word in map(tokenizer.decode, range(100, 400)) if len(tokenizer.encode(word * 2)) >= 2]
    count = arguments.batch_size * arguments.steps
    with (place / "rows.jsonl").open("w") as file:
        for row in range(count):
            text = "".join(words[(row * 31 + i * 7) % len(words)] for i in range(4 * arguments.length))
            file.write(json.dumps({"text": text}) + "\n")


def _run(arguments: argparse.Namespace) -> dict[str, float]:
    times: list[Moment] = []
    before = _peak(arguments.device)
    loss = (_plain if arguments.way == "plain" else _ours)(arguments, times)
    return {
        "step_seconds": statistics.median(wall for wall, _ in times[WARM_STEPS:]),
        "step_processor_seconds": statistics.median(processor for _, processor in times[WARM_STEPS:]),
        "peak_mib": _peak(arguments.device) - before,
        "loss": loss,
    }


def _peak(device: str) -> float:
    """Returns the most memory held so far, MiB: on a GPU what torch allocated, else the process's resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _ours(arguments: argparse.Namespace, times: list[Moment]) -> float:
    from transformers import TrainerCallback

    from deltamux_trainers import TrainOptions, train

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
            self.begun = _now(arguments.device)

        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            times.append(_now(arguments.device).since(self.begun))

    options = TrainOptions(
        method="full",
        model=str(arguments.place / "base"),
        data=arguments.place / "rows.jsonl",
        output=Path(tempfile.mkdtemp(dir=arguments.place)),
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        max_length=arguments.length,
        learning_rate=1e-4,
        warmup_ratio=0.0,
        save_steps=10**6,
        dtype=arguments.dtype,
        device=arguments.device,
        quiet=True,
    )
    return train(options, Clock()).loss


def _plain(arguments: argparse.Namespace, times: list[Moment]) -> float:
    """The loop that anybody would write: autocast over float32 weights where a narrower dtype is asked for."""
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(arguments.place / "base", dtype=torch.float32)
    model = loaded.to(arguments.device).train()
    tokenizer = AutoTokenizer.from_pretrained(arguments.place / "base")
    texts = [json.loads(line)["text"] for line in (arguments.place / "rows.jsonl").read_text().splitlines()]
    rows: Any = torch.tensor([tokenizer.encode(text)[: arguments.length] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / arguments.steps)
    narrow = arguments.dtype != "float32"
    total = 0.0
    for batch in rows.to(arguments.device).split(arguments.batch_size):
        begun = _now(arguments.device)
        with torch.autocast(arguments.device.partition(":")[0], torch.bfloat16, enabled=narrow):
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
        loss: Any = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        total += loss.item()
        times.append(_now(arguments.device).since(begun))
    return total / len(times)


def _now(device: str) -> Moment:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return Moment(time.perf_counter(), time.process_time())


if __name__ == "__main__":
    main()

"""`deltamux demo`: trains adapters of three methods, serves them in one batch, swaps one while traffic runs."""

import asyncio
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.utils.logging import disable_progress_bar

from deltamux.client import AsyncClient, Client
from deltamux.options import DEFAULT_ADDRESS
from deltamux_trainers import TrainOptions, train
from deltamux_trainers.demo.base import BASE_MODEL
from deltamux_trainers.demo.report import heading, line, table, training_bar
from deltamux_trainers.demo.serving import Job, answers, read_jobs, scores, serve_command, serving, throughput
from deltamux_trainers.demo.tasks import TASKS, TenantTask

DRAFT_STEPS = 25
"""Optimizer steps of the first version of the adapter that is swapped later for a well-trained one."""


class Trained(NamedTuple):
    """A tenant's trained adapter."""

    task: TenantTask
    directory: Path
    share: float
    seconds: float


def main(model: str | None, output: Path, steps_scale: float) -> None:
    """Runs the demo on its own base, or on another; what `output` held before is removed."""
    model = model or str(BASE_MODEL)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it so
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    trained, draft = train_all(model, output, steps_scale)
    show(model, output, trained, draft)
    heading("Play on")
    line(shlex.join(serve_command(model, output / "store", DEFAULT_ADDRESS)))
    example = trained[0].task.examples(1, held_out=True)[0][0]["content"]
    line(shlex.join(["deltamux", "generate", "--chat", "--adapter", trained[0].task.resource, example]))


def train_all(model: str, output: Path, scale: float) -> tuple[list[Trained], Trained]:
    """Trains every tenant's adapter, and a draft of the first tenant's."""
    heading("Training three adapters of three methods on one base")
    data = output / "data"
    for task in TASKS:
        task.write(data / task.tenant)
    trained = [train_one(task, model, data, output / "adapters" / task.tenant, scale) for task in TASKS]
    draft = train_one(TASKS[0], model, data, output / "adapters" / "draft", scale, DRAFT_STEPS)
    return trained, draft


def train_one(
    task: TenantTask, model: str, data: Path, directory: Path, scale: float, steps: int | None = None
) -> Trained:
    steps = max(1, round(scale * (steps or int(str(task.training["max_steps"])))))
    given = {**task.training, "max_steps": steps}
    options = TrainOptions(
        method=task.method,
        model=model,
        data=data / task.tenant / "train.jsonl",
        output=directory,
        config=task.options,
        log_steps=steps,
        quiet=True,
        **given,  # type: ignore[arg-type]  # the task names TrainOptions' own fields
    )
    label = f"{task.tenant}: {task.method}"
    with training_bar(label, steps) as bar:
        result = train(options, bar)
    line(f"{label:18} {steps} steps in {result.seconds:.0f} s, {result.share:.2%} of the base's parameters")
    return Trained(task, directory, result.share, result.seconds)


def show(model: str, output: Path, trained: Sequence[Trained], draft: Trained) -> None:
    heading("Starting the server")
    store = output / "store"
    with serving(model, store) as address, Client(address) as client:
        line(f"ready on {address}")
        for each in trained:
            directory = draft.directory if each.task is draft.task else each.directory
            version = client.upload_adapter(each.task.resource, directory)
            line(f"uploaded {version.name} ({version.method}, {version.size_bytes // 1024} KiB)")
        asyncio.run(show_traffic(address, client, output / "data", trained))


async def show_traffic(address: str, client: Client, data: Path, trained: Sequence[Trained]) -> None:
    async with AsyncClient(address) as traffic:
        swapped = trained[0]
        await show_swap(traffic, client, data, swapped)
        await show_scores(traffic, data, trained)
        await show_throughput(traffic, trained)


async def show_swap(traffic: AsyncClient, client: Client, data: Path, swapped: Trained) -> None:
    """Promotes a better version while streams of the old one run, rolls it back, and promotes it again."""
    name = swapped.task.resource
    heading(f"Swapping {name} to a new version while its streams run")
    jobs = read_jobs(data / swapped.task.tenant / "eval.jsonl", name)
    pinned = [Job(f"{name}/versions/1", job.dialogue) for job in jobs]
    alone = await answers(traffic, pinned)
    draft = await scores(traffic, jobs)
    running = asyncio.create_task(answers(traffic, pinned))
    await asyncio.sleep(0.2)
    version = await asyncio.to_thread(client.upload_adapter, name, swapped.directory, promote=True)
    promoted = await scores(traffic, jobs)
    unchanged = await running == alone
    await asyncio.to_thread(client.rollback, name)
    back = await scores(traffic, jobs)
    await asyncio.to_thread(client.promote, name, version=version.version)
    line(f"version 1 (a draft)             {draft:.2f}")
    line(f"version 2, promoted mid-traffic {promoted:.2f}")
    line(f"rolled back to version 1        {back:.2f}")
    line(f"{len(pinned)} streams of version 1 ran on during the swap: {'unchanged' if unchanged else 'CHANGED'}")


async def show_scores(traffic: AsyncClient, data: Path, trained: Sequence[Trained]) -> None:
    """Streams from all tenants and the base at once, and shows what each got."""
    heading("Streaming from all tenants and the base at once")
    base = [read_jobs(data / t.task.tenant / "eval.jsonl", None) for t in trained]
    own = [[Job(t.task.resource, job.dialogue) for job in jobs] for t, jobs in zip(trained, base, strict=True)]
    mixed = [job for row in zip(*base, *own, strict=True) for job in row]
    texts = dict(zip(map(id, mixed), await answers(traffic, mixed), strict=True))

    def right(jobs: list[Job]) -> float:
        return sum(texts[id(job)].strip() == job.expected for job in jobs) / len(jobs)

    rows = [
        [t.task.tenant, t.task.method, t.task.title, f"{right(before):.2f}", f"{right(after):.2f}"]
        for t, before, after in zip(trained, base, own, strict=True)
    ]
    table("Answers that are right to the letter", ("tenant", "method", "task", "base", "adapter"), rows)
    said = [
        [t.task.tenant, before[0].dialogue[0]["content"], texts[id(before[0])], texts[id(after[0])]]
        for t, before, after in zip(trained, base, own, strict=True)
    ]
    table("One message each", ("tenant", "message", "the base says", "the adapter says"), said)


async def show_throughput(traffic: AsyncClient, trained: Sequence[Trained]) -> None:
    heading("Throughput, 32 sequences in one batch")
    names = [t.task.resource for t in trained]
    await throughput(traffic, "warm-up", [None, *names])
    figures = [
        await throughput(traffic, "base alone", [None]),
        await throughput(traffic, f"one adapter ({trained[0].task.method})", names[:1]),
        await throughput(traffic, "three methods and the base, mixed", [None, *names]),
    ]
    base = figures[0].tokens_per_second
    rows = [[f.label, f"{f.tokens_per_second:.0f}", f"{f.tokens_per_second / base:.2f}"] for f in figures]
    table("", ("batch", "tokens/s", "of base"), rows)

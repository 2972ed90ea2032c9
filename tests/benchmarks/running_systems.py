"""The engines of a run: started when a part needs one, kept for the parts after it, never more than two alive."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from benchmarks.inputs import Inputs
from benchmarks.peers import PEFT, VLLM
from deltamux.bench import ClientSystem, EngineSystem, System, Workload, drive
from deltamux.client import AsyncClient
from deltamux.engine.base import Engine, EngineOptions, ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux_testing.server_process import ServerProcess

SLOTS = 32
MAX_ALIVE = 2
HOST_ADAPTERS = 1000
KV_CACHE_GIB = 1.0
PEFT_LORAS = 16
"""Adapters that the peers are given: vLLM needs as many slots, PEFT as much memory."""


class Alive(NamedTuple):
    system: System
    stop: Callable[[], Awaitable[None]]


@dataclass
class RunningSystems:
    """Starts and ends what is measured.

    Attributes:
        max_model_len: longest prompt and generation of the run, virtual tokens included.
        enforce_eager: no engine compiles its model.
    """

    inputs: Inputs
    sequences: int
    max_model_len: int
    say: Callable[[str], None]
    enforce_eager: bool = False
    _alive: OrderedDict[str, Alive] = field(default_factory=OrderedDict)
    _resident: WeakKeyDictionary[Engine, frozenset[str]] = field(default_factory=WeakKeyDictionary)

    @property
    def is_shared(self) -> bool:
        """Whether more than one engine is alive."""
        return len(self._alive) > 1

    async def ours(self, slots: int = SLOTS, programs: dict[str, ProgramRef] | None = None) -> EngineSystem:
        """Returns our engine with so many device slots, and the adapters of `inputs` or the given ones."""
        system = await self._get(f"deltamux with {slots} slots", lambda: self._start_ours(slots))
        assert isinstance(system, EngineSystem)
        return EngineSystem(system.engine, programs or self.inputs.programs)

    async def settle(self, ours: EngineSystem, adapters: frozenset[str]) -> None:
        """Makes these adapters the engine's only ones, each in its slot: no run pays for the one before it."""
        if self._resident.get(ours.engine) == adapters:
            return
        for name, program in ours.programs.items():
            if name not in adapters:
                await ours.engine.evict(program.digest)
        await drive(ours, Workload(tuple(sorted(adapters)), new_tokens=1, sequences=len(adapters)), "settle")
        self._resident[ours.engine] = adapters

    async def vllm(self, *, loras: bool) -> System:
        """Returns vLLM without deltamux; with its own multi-LoRA or as it comes."""
        name = "vLLM with LoRA" if loras else "vLLM"
        return await self._get(name, lambda: self._start_vllm(loras))

    async def server(self) -> ClientSystem:
        """Returns a connection to a server process of ours that holds the LoRAs."""
        system = await self._get("deltamux serve", self._start_server)
        assert isinstance(system, ClientSystem)
        return system

    def peft(self) -> PEFT:
        loras = {name: self.inputs.directories[name] for name in self.inputs.loras(PEFT_LORAS)}
        return PEFT.load(self.inputs.model, loras, self.inputs.base.dims.vocab_size)

    async def close(self) -> None:
        while self._alive:
            _, alive = self._alive.popitem(last=False)
            await alive.stop()

    async def _get(self, name: str, start: Callable[[], Awaitable[Alive]]) -> System:
        if name not in self._alive:
            while len(self._alive) >= MAX_ALIVE:
                _, oldest = self._alive.popitem(last=False)
                await oldest.stop()
            self.say(f"starting {name}")
            self._alive[name] = await start()
        self._alive.move_to_end(name)
        return self._alive[name].system

    async def _start_ours(self, slots: int) -> Alive:
        engine = VLLMEngine(
            EngineOptions(
                str(self.inputs.model),
                dtype="bfloat16",
                max_model_len=self.max_model_len,
                max_num_seqs=self.sequences,
                max_active_adapters=slots,
                max_host_adapters=HOST_ADAPTERS,
                kv_cache_gib=KV_CACHE_GIB,
                enforce_eager=self.enforce_eager,
            )
        )
        await engine.start()
        return Alive(EngineSystem(engine), engine.stop)

    async def _start_vllm(self, loras: bool) -> Alive:
        arguments: dict[str, Any] = {
            "model": str(self.inputs.model),
            "dtype": "bfloat16",
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.sequences,
            "kv_cache_memory_bytes": int(KV_CACHE_GIB * 1024**3),
            "disable_log_stats": True,
            "enforce_eager": self.enforce_eager,
        }
        own = {name: self.inputs.directories[name] for name in self.inputs.loras(PEFT_LORAS)} if loras else {}
        if loras:
            arguments |= {"enable_lora": True, "max_loras": PEFT_LORAS, "max_lora_rank": 8}
        peer = VLLM(arguments, own, self.inputs.base.dims.vocab_size)
        await peer.start()
        return Alive(peer, peer.stop)

    async def _start_server(self) -> Alive:
        given = {
            "--dtype": "bfloat16",
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.sequences,
            "--max-active-adapters": SLOTS,
            "--kv-cache-gib": KV_CACHE_GIB,
        }
        options = [str(part) for pair in given.items() for part in pair]
        store = self.inputs.folder / "store"
        process = await asyncio.to_thread(ServerProcess, self.inputs.model, store, *options, eager=self.enforce_eager)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, process.stop)
            client = await stack.enter_async_context(AsyncClient(process.address, timeout=600))
            for name in self.inputs.loras(PEFT_LORAS):
                await client.upload_adapter(served_name(name), self.inputs.directories[name])
            return Alive(ClientSystem(client), stack.pop_all().aclose)
        raise AssertionError("the stack swallows no error")


def served_name(adapter: str) -> str:
    """Returns an adapter's resource name on the server."""
    return f"tenants/bench/adapters/{adapter}"

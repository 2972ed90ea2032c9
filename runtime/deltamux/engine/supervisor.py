"""Keeps an engine running: one that dies or hangs is ended and replaced, until it does so too often."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from deltamux.engine.base import Engine, EngineStats, GenerationChunk, ProgramRef, Prompt, SamplingOptions
from deltamux.errors import DeltamuxError, UnavailableError

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel

T = TypeVar("T")
log = logging.getLogger("deltamux.engine")

DEATH_SECONDS = 2.0
"""From the first call that fails because an engine dies until its death is seen, at most."""

LEAST_WAIT, MOST_WAIT = 1.0, 60.0
"""Seconds between which the advice lies when to send a request again."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead engine is replaced, and when it is given up. All times are in seconds.

    Attributes:
        restarts: deaths within `window` that are followed by a restart; the next one ends the server. A start that
            fails counts as a death.
        window: how long a death counts.
        first_delay: before the first restart; doubles with each death within the window, up to `longest_delay`.
        settled: an engine that has lived so long is restarted after `first_delay` again.
        look_interval: between looks at whether the engine lives.
        ask_interval: between questions to an engine that seems to live.
        patience: how long an answer may take; an engine that takes longer does not count as healthy.
        longest_silence: how long no answer may come, at most; then the engine hangs, and counts as dead. Engines answer
            between two steps, so this is more than the longest step takes.
    """

    restarts: int = 10
    window: float = 600.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    settled: float = 60.0
    look_interval: float = 0.1
    ask_interval: float = 10.0
    patience: float = 30.0
    longest_silence: float = 120.0


@dataclass(eq=False)
class _Life:
    """One engine, from its start to its death.

    Attributes:
        silent: whether it owes an answer for longer than it may.
        ended: set once the engine is dead.
    """

    engine: Engine
    began: float
    silent: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def ends_within(self, seconds: float) -> bool:
        """Waits for the engine's death for at most so long; returns whether it is dead."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)
        return self.ended.is_set()


class SupervisedEngine:
    """An engine that comes back. See `deltamux.engine.base.Engine` for its methods.

    While no engine lives, they raise UnavailableError, whose `retry_after` says when one may be back. What was pinned
    is pinned again in the next engine.

    Args:
        first: the engine to start with; not started yet.
        make: makes the next one, of the same options; called in a thread.

    Attributes:
        changed: set, and replaced by another event, when `healthy` changes.
    """

    def __init__(self, first: Engine, make: Callable[[], Engine], policy: RestartPolicy | None = None) -> None:
        self.base: BaseModel = first.base
        self.max_model_len = first.max_model_len
        self.changed = asyncio.Event()
        self._next = first
        self._make = make
        self._policy = policy or RestartPolicy()
        self._life: _Life | None = None
        self._pins: dict[str, ProgramRef] = {}
        self._deaths: deque[float] = deque()
        self._in_a_row = 0
        self._start_seconds = 0.0
        self._back_at = 0.0
        self._lost: asyncio.Future[UnavailableError] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the first engine; raises what its start raises. Those that follow start by themselves."""
        await self._launch(self._next)
        self._watching = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Ends the engine, and the supervision."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._life is not None:
            life = self._life
            self._end(life)
            await life.engine.stop()

    async def lost(self) -> UnavailableError:
        """Waits until the engine is given up, which may be never; returns the reason."""
        return await asyncio.shield(self._lost)

    @property
    def healthy(self) -> bool:
        return self._life is not None and self._life.engine.healthy and not self._life.silent

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        program: ProgramRef | None,
        *,
        request_id: str,
        stream: bool = True,
        group: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[GenerationChunk]:
        life = self._living()
        chunks = life.engine.generate(
            prompt, sampling, program, request_id=request_id, stream=stream, group=group, cache_salt=cache_salt
        )
        async with self._unavailable_once_ended(life), aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def prepare(self, program: ProgramRef) -> None:
        await self._ask(lambda engine: engine.prepare(program))

    async def check(self, program: ProgramRef) -> None:
        await self._ask(lambda engine: engine.check(program))

    async def pin(self, program: ProgramRef) -> None:
        """Pins a program in this engine and in those that follow; without one it is pinned in the next."""
        self._pins[program.digest] = program
        try:
            await self._ask(lambda engine: engine.pin(program))
        except UnavailableError:
            pass
        except DeltamuxError:
            self._pins.pop(program.digest, None)
            raise

    async def unpin(self, digest: str) -> None:
        self._pins.pop(digest, None)
        with suppress(UnavailableError):  # the next engine does not pin it
            await self._ask(lambda engine: engine.unpin(digest))

    async def evict(self, digest: str) -> None:
        self._pins.pop(digest, None)
        with suppress(UnavailableError):  # it went with the engine
            await self._ask(lambda engine: engine.evict(digest))

    async def stats(self) -> EngineStats:
        return await self._ask(lambda engine: engine.stats())

    async def ping(self) -> None:
        await self._ask(lambda engine: engine.ping())

    # One life after the other.

    async def _supervise(self) -> None:
        while self._life is not None:
            cause = await self._death(self._life)
            life = self._life
            self._end(life)
            await _bury(life.engine)
            if asyncio.get_running_loop().time() - life.began >= self._policy.settled:
                self._in_a_row = 0
            while self._life is None:
                if self._counts_too_many():
                    self._give_up(cause)
                    return
                cause = await self._restart(cause)

    async def _launch(self, engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await engine.start()
        except BaseException:
            await _bury(engine)
            raise
        self._start_seconds = loop.time() - began
        self.max_model_len = engine.max_model_len
        self._life = _Life(engine, loop.time())
        self._tell()

    async def _death(self, life: _Life) -> str:
        """Waits until the engine is dead, or hangs; returns which, in words."""
        loop, policy = asyncio.get_running_loop(), self._policy
        ask_at = loop.time() + policy.ask_interval
        while life.engine.healthy:
            if loop.time() >= ask_at:
                if not await self._answers(life):
                    return f"it has not answered for {policy.longest_silence:g} s"
                ask_at = loop.time() + policy.ask_interval
            await asyncio.sleep(policy.look_interval)
        return "its process has ended"

    async def _answers(self, life: _Life) -> bool:
        """Whether the engine answers: one whose worker hangs claims to be well, but does not."""
        asking = asyncio.ensure_future(life.engine.ping())
        try:
            await asyncio.wait([asking], timeout=self._policy.patience)
            if not asking.done():
                log.error("the engine has not answered for %g s", self._policy.patience)
                self._silence(life, True)
                await asyncio.wait([asking], timeout=self._policy.longest_silence - self._policy.patience)
                self._silence(life, False)
            if asking.done() and (error := asking.exception()) is not None:  # whether it lives is looked at next
                log.error("the engine failed to say how it is: %s", error)
            return asking.done()
        finally:
            asking.cancel()

    def _silence(self, life: _Life, silent: bool) -> None:
        life.silent = silent
        self._tell()

    async def _restart(self, cause: str) -> str:
        """Starts another engine after the delay; returns why there is none, in words, if it does not start."""
        policy = self._policy
        delay = min(policy.first_delay * 2 ** (self._in_a_row - 1), policy.longest_delay)
        self._back_at = asyncio.get_running_loop().time() + delay + self._start_seconds
        log.error("the engine is down: %s; another one is started in %.1f s", cause, delay)
        await asyncio.sleep(delay)
        try:
            await self._launch(await asyncio.to_thread(self._make))
        except Exception as error:
            log.error("the engine did not start: %s", error, exc_info=not isinstance(error, DeltamuxError))
            return f"it did not start ({error})"
        log.warning("the engine serves again")
        await self._restore_pins()
        return cause

    async def _restore_pins(self) -> None:
        for digest, program in list(self._pins.items()):
            if self._pins.get(digest) is program:  # it may have been unpinned meanwhile
                try:
                    await self._ask(lambda engine: engine.pin(program))  # noqa: B023 - awaited here
                except DeltamuxError as error:
                    log.error("program %s is not pinned again: %s", digest[:12], error.message)

    def _counts_too_many(self) -> bool:
        """Counts one more death; returns whether they exceed the policy's restarts."""
        now = asyncio.get_running_loop().time()
        self._in_a_row += 1
        self._deaths.append(now)
        while self._deaths[0] <= now - self._policy.window:
            self._deaths.popleft()
        return len(self._deaths) > self._policy.restarts

    def _give_up(self, cause: str) -> None:
        died = "has died" if len(self._deaths) == 1 else f"has died {len(self._deaths)} times"
        error = UnavailableError(
            f"the engine {died} within {self._policy.window:g} s, and {self._policy.restarts} restarts are allowed: "
            f"{cause}. Its log, above, says why; start the server again once that is mended",
            reason="ENGINE_LOST",
        )
        log.error("%s", error.message)
        self._lost.set_result(error)

    def _end(self, life: _Life) -> None:
        self._life = None
        self._back_at = asyncio.get_running_loop().time() + self._policy.first_delay + self._start_seconds
        life.ended.set()
        self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _living(self) -> _Life:
        if self._life is None or not self._life.engine.healthy:
            raise self._unavailable()
        return self._life

    def _unavailable(self) -> UnavailableError:
        wait = self._back_at - asyncio.get_running_loop().time()
        return UnavailableError(
            "the engine is down; send the request again once the server's health is SERVING",
            retry_after=min(max(wait, LEAST_WAIT), MOST_WAIT),
        )

    @asynccontextmanager
    async def _unavailable_once_ended(self, life: _Life) -> AsyncIterator[None]:
        """Whatever an engine raises while it dies means that there is none at the moment."""
        try:
            yield
        except UnavailableError as error:
            raise self._unavailable() from error
        except DeltamuxError:
            raise
        except Exception as error:
            # What an engine is asked may fail before its death is seen.
            if not await life.ends_within(DEATH_SECONDS):
                raise
            raise self._unavailable() from error

    async def _ask(self, call: Callable[[Engine], Awaitable[T]]) -> T:
        """Returns what the engine answers; raises UnavailableError if it dies or is given up before."""
        life = self._living()
        asking = asyncio.ensure_future(call(life.engine))
        ended = asyncio.ensure_future(life.ended.wait())
        try:
            async with self._unavailable_once_ended(life):
                await asyncio.wait([asking, ended], return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    raise self._unavailable()
                return asking.result()
        finally:
            asking.cancel()
            ended.cancel()


async def _bury(engine: Engine) -> None:
    """Ends what is left of an engine: nothing of it may hold memory when the next one starts."""
    try:
        await engine.stop()
    except Exception:
        log.exception("an engine did not end as it should")

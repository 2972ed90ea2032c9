"""`SupervisedEngine`: an engine that is restarted when it dies or hangs, up to a limit."""

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
    from deltamux.deltas import BaseModel, BaseSupport

T = TypeVar("T")
log = logging.getLogger("deltamux.engine")

DEATH_SECONDS = 2.0
"""From the first call that fails because an engine dies until its death is noticed, at most."""

LEAST_WAIT, MOST_WAIT = 1.0, 60.0
"""Least and most seconds of `retry_after`."""


@dataclass(frozen=True)
class RestartPolicy:
    """The rule by which a dead engine is restarted, or given up. All times are in seconds.

    Attributes:
        restarts: deaths within `window` that are followed by a restart; the next one ends the server. A start that
            fails counts as a death.
        window: how long a death counts.
        first_delay: before the first restart; doubles with each death within the window, up to `longest_delay`.
        settled: an engine that has run for so long is restarted after `first_delay` again.
        check_interval: between checks of the engine's health.
        ping_interval: between pings of an engine that seems healthy.
        ping_timeout: after so long without an answer to a ping an engine is not healthy.
        hang_seconds: after so long without an answer the engine hangs, and counts as dead. Engines answer between two
            steps, so this is more than the longest step takes.
    """

    restarts: int = 10
    window: float = 600.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    settled: float = 60.0
    check_interval: float = 0.1
    ping_interval: float = 10.0
    ping_timeout: float = 30.0
    hang_seconds: float = 120.0


@dataclass(eq=False)
class _RunningEngine:
    """One engine, from its start to its death.

    Attributes:
        silent: whether an answer to a ping is overdue.
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
    """An `Engine` that is restarted; see the module.

    While no engine runs, methods raise UnavailableError with `retry_after`. Pins are set again in the next engine.

    Args:
        first: the engine to start with; not started yet.
        make: makes the next one, of the same options; called in a thread.

    Attributes:
        changed: set, and replaced by another event, when `healthy` changes.
    """

    def __init__(self, first: Engine, make: Callable[[], Engine], policy: RestartPolicy | None = None) -> None:
        self.base: BaseModel = first.base
        self.max_model_len = first.max_model_len
        self.support: BaseSupport | None = None
        self.changed = asyncio.Event()
        self._next = first
        self._make = make
        self._policy = policy or RestartPolicy()
        self._running: _RunningEngine | None = None
        self._pins: dict[str, ProgramRef] = {}
        self._deaths: deque[float] = deque()
        self._deaths_in_a_row = 0
        self._start_seconds = 0.0
        self._back_at = 0.0
        self._lost: asyncio.Future[UnavailableError] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the first engine, and raises what that raises; later ones are started by the supervision."""
        await self._launch(self._next)
        self._watching = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Ends the engine, and the supervision."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._running is not None:
            running = self._running
            self._end(running)
            await running.engine.stop()

    async def lost(self) -> UnavailableError:
        """Waits until the engine is given up, which may be never; returns the reason."""
        return await asyncio.shield(self._lost)

    @property
    def healthy(self) -> bool:
        return self._running is not None and self._running.engine.healthy and not self._running.silent

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
        running = self._require_running()
        chunks = running.engine.generate(
            prompt, sampling, program, request_id=request_id, stream=stream, group=group, cache_salt=cache_salt
        )
        async with self._unavailable_once_ended(running), aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def prepare(self, program: ProgramRef) -> None:
        await self._call(lambda engine: engine.prepare(program))

    async def check(self, program: ProgramRef) -> None:
        await self._call(lambda engine: engine.check(program))

    async def pin(self, program: ProgramRef) -> None:
        """Pins a program in this engine and in those that follow; without one it is pinned in the next."""
        self._pins[program.digest] = program
        try:
            await self._call(lambda engine: engine.pin(program))
        except UnavailableError:
            pass
        except DeltamuxError:
            self._pins.pop(program.digest, None)
            raise

    async def unpin(self, digest: str) -> None:
        self._pins.pop(digest, None)
        with suppress(UnavailableError):  # the next engine does not pin it
            await self._call(lambda engine: engine.unpin(digest))

    async def evict(self, digest: str) -> None:
        self._pins.pop(digest, None)
        with suppress(UnavailableError):  # it went with the engine
            await self._call(lambda engine: engine.evict(digest))

    async def stats(self) -> EngineStats:
        return await self._call(lambda engine: engine.stats())

    async def ping(self) -> None:
        await self._call(lambda engine: engine.ping())

    # One running after the other.

    async def _supervise(self) -> None:
        while self._running is not None:
            cause = await self._death(self._running)
            running = self._running
            self._end(running)
            await _dispose(running.engine)
            if asyncio.get_running_loop().time() - running.began >= self._policy.settled:
                self._deaths_in_a_row = 0
            while self._running is None:
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
            await _dispose(engine)
            raise
        self._start_seconds = loop.time() - began
        self.max_model_len, self.support = engine.max_model_len, engine.support
        self._running = _RunningEngine(engine, loop.time())
        self._notify()

    async def _death(self, running: _RunningEngine) -> str:
        """Waits until the engine is dead, or hangs; returns which, in words."""
        loop, policy = asyncio.get_running_loop(), self._policy
        ping_at = loop.time() + policy.ping_interval
        while running.engine.healthy:
            if loop.time() >= ping_at:
                if not await self._answers_ping(running):
                    return f"it has not answered for {policy.hang_seconds:g} s"
                ping_at = loop.time() + policy.ping_interval
            await asyncio.sleep(policy.check_interval)
        return "its process has ended"

    async def _answers_ping(self, running: _RunningEngine) -> bool:
        """Returns whether the engine answers a ping; one whose worker hangs reports itself healthy, but does not."""
        pending = asyncio.ensure_future(running.engine.ping())
        try:
            await asyncio.wait([pending], timeout=self._policy.ping_timeout)
            if not pending.done():
                log.error("the engine has not answered for %g s", self._policy.ping_timeout)
                self._set_silent(running, True)
                await asyncio.wait([pending], timeout=self._policy.hang_seconds - self._policy.ping_timeout)
                self._set_silent(running, False)
            if pending.done() and (error := pending.exception()) is not None:  # its health is checked next
                log.error("the engine's answer to a ping is an error: %s", error)
            return pending.done()
        finally:
            pending.cancel()

    def _set_silent(self, running: _RunningEngine, silent: bool) -> None:
        running.silent = silent
        self._notify()

    async def _restart(self, cause: str) -> str:
        """Starts another engine after the delay; returns why there is none, in words, if it does not start."""
        policy = self._policy
        delay = min(policy.first_delay * 2 ** (self._deaths_in_a_row - 1), policy.longest_delay)
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
                    await self._call(lambda engine: engine.pin(program))  # noqa: B023 - awaited here
                except DeltamuxError as error:
                    log.error("program %s is not pinned again: %s", digest[:12], error.message)

    def _counts_too_many(self) -> bool:
        """Counts one more death; returns whether they exceed the policy's restarts."""
        now = asyncio.get_running_loop().time()
        self._deaths_in_a_row += 1
        self._deaths.append(now)
        while self._deaths[0] <= now - self._policy.window:
            self._deaths.popleft()
        return len(self._deaths) > self._policy.restarts

    def _give_up(self, cause: str) -> None:
        died = "has died" if len(self._deaths) == 1 else f"has died {len(self._deaths)} times"
        error = UnavailableError(
            f"the engine {died} within {self._policy.window:g} s, and {self._policy.restarts} restarts are allowed: "
            f"{cause}. The reason is in its log, above; start the server again once it is mended",
            reason="ENGINE_LOST",
        )
        log.error("%s", error.message)
        self._lost.set_result(error)

    def _end(self, running: _RunningEngine) -> None:
        self._running = None
        self._back_at = asyncio.get_running_loop().time() + self._policy.first_delay + self._start_seconds
        running.ended.set()
        self._notify()

    def _notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _require_running(self) -> _RunningEngine:
        if self._running is None or not self._running.engine.healthy:
            raise self._unavailable()
        return self._running

    def _unavailable(self) -> UnavailableError:
        wait = self._back_at - asyncio.get_running_loop().time()
        return UnavailableError(
            "the engine is down; send the request again once the server's health is SERVING",
            retry_after=min(max(wait, LEAST_WAIT), MOST_WAIT),
        )

    @asynccontextmanager
    async def _unavailable_once_ended(self, running: _RunningEngine) -> AsyncIterator[None]:
        """A block in which any error of a dying engine becomes UnavailableError."""
        try:
            yield
        except UnavailableError as error:
            raise self._unavailable() from error
        except DeltamuxError:
            raise
        except Exception as error:
            # A call may fail before the engine's death is noticed.
            if not await running.ends_within(DEATH_SECONDS):
                raise
            raise self._unavailable() from error

    async def _call(self, call: Callable[[Engine], Awaitable[T]]) -> T:
        """Returns the result of a call of the engine; raises UnavailableError if it dies or is given up before."""
        running = self._require_running()
        pending = asyncio.ensure_future(call(running.engine))
        ended = asyncio.ensure_future(running.ended.wait())
        try:
            async with self._unavailable_once_ended(running):
                await asyncio.wait([pending, ended], return_when=asyncio.FIRST_COMPLETED)
                if not pending.done():
                    raise self._unavailable()
                return pending.result()
        finally:
            pending.cancel()
            ended.cancel()


async def _dispose(engine: Engine) -> None:
    """Ends all processes of an engine, so that none holds memory when the next one starts."""
    try:
        await engine.stop()
    except Exception:
        log.exception("an engine did not end cleanly")

"""The server process: start, serve until SIGTERM or SIGINT, drain."""

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import grpc

from deltamux.deltas import BaseModel
from deltamux.engine.arguments import check_options
from deltamux.engine.base import Engine, EngineOptions
from deltamux.engine.supervisor import RestartPolicy, SupervisedEngine
from deltamux.server import STOPPED
from deltamux.server.access.auth import key_authentication, load_admin_key, without_authentication
from deltamux.server.access.concurrency import ConcurrencyLimit
from deltamux.server.compiling.compiler import Compiler
from deltamux.server.compiling.fitting import Fitting
from deltamux.server.compiling.job import Budgets
from deltamux.server.compiling.quarantine import Quarantine
from deltamux.server.compiling.recompiling import Recompiler
from deltamux.server.disk import DiskThreads
from deltamux.server.options import ServeOptions
from deltamux.server.pins import Pins
from deltamux.server.programs import Programs
from deltamux.server.routing import Router
from deltamux.server.rpc.adapters import AdaptersService
from deltamux.server.rpc.events import EventHub
from deltamux.server.rpc.health import HealthMonitor
from deltamux.server.rpc.inference import InferenceService
from deltamux.server.rpc.reflection import add_reflection
from deltamux.server.rpc.tenants import TenantsService
from deltamux.server.rpc.uploads import UploadLimits
from deltamux.server.transport.interceptors import ContextManagerInterceptor, RpcContextManager, map_errors_to_statuses
from deltamux.server.transport.listening import SERVER_OPTIONS, bind, check_exposure, raise_descriptor_limit
from deltamux.server.transport.logs import limit_line_length
from deltamux.server.transport.pacing import CallPacer, RefusalPacer
from deltamux.server.transport.services import HEALTH, Services
from deltamux.server.transport.validation import RequestValidator
from deltamux.store import AdapterStore, VersionRecord
from deltamux.v1 import adapters_pb2, inference_pb2, tenants_pb2
from deltamux.v1.adapters_pb2_grpc import add_AdaptersServicer_to_server
from deltamux.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from deltamux.v1.tenants_pb2_grpc import add_TenantsServicer_to_server

log = logging.getLogger("deltamux.server")

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((inference_pb2, "Inference"), (adapters_pb2, "Adapters"), (tenants_pb2, "Tenants"))
)
GC_THRESHOLD = (50_000, 20, 100)
"""Thresholds of the garbage collector: at Python's 700 objects, it runs again for each call of a burst."""

UPLOAD_QUEUE_SECONDS = 30.0
"""Seconds that an upload waits for a permit."""

EngineFactory = Callable[[EngineOptions], Engine]


@dataclass(frozen=True)
class RunningServer:
    """A server that accepts calls.

    Attributes:
        address: the address for clients.
    """

    address: str
    engine: SupervisedEngine
    store: AdapterStore


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT; prints ``ready on ADDRESS`` once requests are accepted.

    A signal during start-up cancels it.

    Raises:
        UnavailableError: the engine is not restarted any more (see `RestartPolicy`); running requests were drained.
    """
    raise_descriptor_limit()
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    stop, started = asyncio.Event(), asyncio.Event()
    serving = asyncio.ensure_future(_run_until_stopped(options, stop, started))

    def on_signal() -> None:
        if not (stop.is_set() or started.is_set()):
            serving.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    await asyncio.wait([serving])
    if serving.cancelled():
        print(STOPPED, flush=True)
    else:
        serving.result()


async def _run_until_stopped(options: ServeOptions, stop: asyncio.Event, started: asyncio.Event) -> None:
    async with running(options) as server:
        started.set()
        # The objects of start-up stay: one collection over them would delay every stream by half a second.
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        gc.enable()
        for line in server.engine.support.lines() if server.engine.support is not None else ():
            print(line, flush=True)
        print(f"ready on {server.address}", flush=True)
        lost = asyncio.create_task(server.engine.lost())
        await asyncio.wait([asyncio.create_task(stop.wait()), lost], return_when=asyncio.FIRST_COMPLETED)
        print("draining", flush=True)
    if lost.done():
        raise lost.result()


def vllm_engines() -> EngineFactory:
    """Returns a factory of vLLM engines that reads the base model's description once."""
    known: list[BaseModel] = []

    def make(options: EngineOptions) -> Engine:
        from deltamux.engine.vllm.frontend.engine import VLLMEngine

        engine = VLLMEngine(options, base=known[0] if known else None)
        known[:] = [engine.base]
        return engine

    return make


@asynccontextmanager
async def running(
    options: ServeOptions, make_engine: EngineFactory | None = None, shared_compiler: Compiler | None = None
) -> AsyncIterator[RunningServer]:
    """Runs a server for the length of the block; leaving it drains.

    Args:
        make_engine: called for the first engine and for each restart; None: vLLM engines.
        shared_compiler: a compiler that the caller closes; None starts the server's own.
    Raises:
        FailedPreconditionError: the address, the store or the base model cannot be used.
    """
    check_exposure(options)
    check_options(options.engine_options())
    limit_line_length(logging.getLogger("deltamux.server"))
    async with AsyncExitStack() as stack:
        store = await asyncio.to_thread(AdapterStore.open, options.store)
        stack.callback(store.close)
        validator = RequestValidator()
        server = _grpc_server(options, store, validator)
        # Before the model is loaded, which takes long: a taken address fails at once, and clients get an answer.
        address = bind(server, options)
        services = Services(SERVICES)
        await services.start(server)
        stack.push_async_callback(server.stop, None)
        # It starts in parallel with the engine, which takes longer.
        compiler = shared_compiler or Compiler(options.plugin_timeout_seconds)
        if compiler is not shared_compiler:
            await stack.enter_async_context(compiler)
        engine = await _supervised(options, make_engine or vllm_engines())
        stack.push_async_callback(engine.stop)
        await engine.start()
        validator.max_model_len = engine.max_model_len
        await compiler.started()
        events = EventHub()
        await _add_services(stack, services, options, store, engine, compiler, events)
        health = HealthMonitor(engine, SERVICES, services.health)
        async with _serving(server, health, events, options.drain_seconds):
            yield RunningServer(address, engine, store)


async def _add_services(
    stack: AsyncExitStack,
    services: Services,
    options: ServeOptions,
    store: AdapterStore,
    engine: Engine,
    compiler: Compiler,
    events: EventHub,
) -> None:
    """Adds all services; what they need is closed with the stack."""
    threads = stack.enter_context(DiskThreads(options.max_concurrent_uploads + 4, "deltamux-disk"))
    programs = await _programs(options, store, engine, compiler, threads)
    max_pinned = max(1, options.max_host_adapters // 2)
    pins = Pins(store, engine, programs, options.max_pinned_adapters_per_tenant, max_pinned, threads)
    _follow_removals(store, engine, pins)
    restoring = asyncio.create_task(pins.restore())
    stack.callback(restoring.cancel)
    adapters = AdaptersService(
        store,
        programs,
        pins,
        Quarantine(store, compiler, engine, _budgets(options), threads),
        events,
        _upload_limit(options.max_concurrent_uploads),
        UploadLimits(options.max_adapter_bytes, options.upload_idle_seconds, options.upload_min_bytes_per_second),
        threads,
    )
    services.add(add_InferenceServicer_to_server, _inference_service(options, store, engine, programs, compiler))
    services.add(add_AdaptersServicer_to_server, adapters)
    services.add(add_TenantsServicer_to_server, TenantsService(store, events, threads))
    add_reflection((*SERVICES, HEALTH), services)
    services.complete()


async def _supervised(options: ServeOptions, make_engine: EngineFactory) -> SupervisedEngine:
    given = options.engine_options()
    restarts = options.engine_restarts if options.on_engine_death == "restart" else 0
    policy = RestartPolicy(
        restarts, first_delay=options.engine_restart_seconds, hang_seconds=options.engine_silence_seconds
    )
    first = await asyncio.to_thread(make_engine, given)
    return SupervisedEngine(first, lambda: make_engine(given), policy)


@asynccontextmanager
async def _serving(
    server: grpc.aio.Server, health: HealthMonitor, events: EventHub, drain_seconds: float
) -> AsyncIterator[None]:
    """Follows the engine's health for the length of the block; leaving it drains the running calls."""
    await health.update()
    watching = asyncio.create_task(health.run())
    try:
        yield
    finally:
        await health.stop_serving()
        events.close()
        await server.stop(drain_seconds)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def _grpc_server(options: ServeOptions, store: AdapterStore, validator: RequestValidator) -> grpc.aio.Server:
    identify: RpcContextManager = without_authentication()
    if options.auth == "keys":
        identify = key_authentication(store, load_admin_key(options.admin_key_file or options.store / "admin.key"))
    return grpc.aio.server(
        interceptors=[
            CallPacer(),
            ContextManagerInterceptor(map_errors_to_statuses(RefusalPacer().delay)),
            ContextManagerInterceptor(identify),
            validator,
        ],
        options=SERVER_OPTIONS,
    )


def _inference_service(
    options: ServeOptions, store: AdapterStore, engine: Engine, programs: Programs, compiler: Compiler
) -> InferenceService:
    return InferenceService(
        engine,
        Router(store, programs),
        # The last quarter is reserved for tenants without a permit: long generations of one tenant block no other.
        ConcurrencyLimit(options.max_pending_requests, "generations", reserved=options.max_pending_requests // 4),
        Fitting(compiler, engine.base),
        share_prefix_cache=options.share_prefix_cache,
    )


async def _programs(
    options: ServeOptions, store: AdapterStore, engine: Engine, compiler: Compiler, threads: DiskThreads
) -> Programs:
    base = engine.base
    if others := await asyncio.to_thread(store.programs.set_base, base.fingerprint):
        what = "recompiled when they are used" if options.recompile else "refused; `--recompile` recompiles them"
        log.warning(
            "%d versions of the store were compiled for another base than %s: %s", others, base.fingerprint, what
        )
    recompile = Recompiler(store, compiler, base, _budgets(options), threads) if options.recompile else None
    return Programs(store, engine, threads, recompile)


def _budgets(options: ServeOptions) -> Budgets:
    return Budgets(options.max_lora_rank, options.max_virtual_tokens, options.max_adapter_bytes)


def _upload_limit(limit: int) -> ConcurrencyLimit:
    """Returns the limit of concurrent uploads; its last quarter is reserved for tenants without a permit."""
    return ConcurrencyLimit(limit, "uploads", reserved=limit // 4, queue_size=16 * limit, timeout=UPLOAD_QUEUE_SECONDS)


def _follow_removals(store: AdapterStore, engine: Engine, pins: Pins) -> None:
    """Unpins a version once it is removed, and evicts its program once no version has its content any more."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Future[None]] = set()

    async def unload(record: VersionRecord, last: bool) -> None:
        await pins.forget(record)
        if last:
            await engine.evict(record.compiled.digest)

    def begin(record: VersionRecord, last: bool) -> None:
        task = asyncio.ensure_future(unload(record, last))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def removed(record: VersionRecord, last: bool) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(begin, record, last)

    store.on_removed = removed

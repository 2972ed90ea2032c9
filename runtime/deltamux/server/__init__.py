"""The gRPC server. Importing this package is cheap; `serve` imports the engine."""

import gc
import os
import signal
from types import FrameType

from deltamux.server.options import ServeOptions

__all__ = ["ServeOptions", "serve"]

STOPPED = "stopped before it was ready"


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT; prints ``ready on ADDRESS`` once requests are accepted."""
    # Imports make a million objects that stay; collecting garbage among them takes a quarter of the import time.
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGINT):  # until `run` has handlers of its own
        signal.signal(number, _end)
    from deltamux.engine.vllm import fork_server

    fork_server.start()  # it imports vLLM while this process does
    from deltamux.server.app import serve as run

    run(options)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends this process and its fork server at once; nothing is open yet.

    An exception would be raised in the middle of an import, and libraries take it there for a missing module.
    """
    from deltamux.engine.vllm import fork_server

    os.write(1, f"{STOPPED}\n".encode())
    fork_server.stop_idle()
    os._exit(0)

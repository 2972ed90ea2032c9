"""The gRPC server. Importing this package is cheap; `serve` imports the engine."""

import gc

from deltamux.server.options import ServeOptions

__all__ = ["ServeOptions", "serve"]


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT; prints ``ready on ADDRESS`` once requests are accepted."""
    # Imports make a million objects that stay; collecting garbage among them takes a quarter of the import time.
    gc.disable()
    from deltamux.engine.vllm import fork_server

    fork_server.start()  # it imports vLLM while this process does
    from deltamux.server.app import serve as run

    run(options)

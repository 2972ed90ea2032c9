"""The gRPC server. Importing this package is cheap; `serve` brings in the engine."""

import gc

from deltamux.server.options import ServeOptions

__all__ = ["ServeOptions", "serve"]


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT; prints ``ready on ADDRESS`` when requests can come."""
    # Imports make a million objects that stay; to look for garbage among them takes a quarter of their time.
    gc.disable()
    from deltamux.server.app import serve as run

    run(options)

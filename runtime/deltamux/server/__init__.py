"""The gRPC server. Importing this package is cheap; `serve` brings in the engine."""

from deltamux.server.options import ServeOptions

__all__ = ["ServeOptions", "serve"]


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT; prints ``ready on ADDRESS`` when requests can come."""
    from deltamux.server.app import serve as run

    run(options)

"""`LoaderServer`: a worker's end of the channel to its loader."""

import contextlib
import json
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deltamux.engine.vllm.loading.loader import Loaded, ProgramLoader, outcome

MAX_PROBLEM = 1000
"""Characters of the reason why a worker ends."""


class LoaderServer:
    """A worker's end of the channel: serves the front end in a thread of its own, until its connection ends.

    Args:
        path: of the socket; its directory exists.
    """

    def __init__(self, loader: ProgramLoader, path: Path) -> None:
        self._loader = loader
        self._writing = threading.Lock()
        self._connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        threading.Thread(target=self._serve, name="delta-loader-server", daemon=True).start()

    def _serve(self) -> None:
        with self._listener:
            self._connection = connection = self._listener.accept()[0]
        # A connection that breaks means that the front end has gone; vLLM ends this process then.
        with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                self._handle(json.loads(line), connection)

    def _handle(self, message: dict[str, Any], connection: socket.socket) -> None:
        if "drop" in message:
            self._loader.drop(message["drop"])
            return
        program_id: int = message["load"]
        future = self._loader.load(program_id, Path(message["path"]), message["sha256"])
        future.add_done_callback(lambda done: self._send_outcome(program_id, done, connection))

    def _send_outcome(self, program_id: int, future: Future[Loaded], connection: socket.socket) -> None:
        state = outcome(future)
        seconds = future.result().seconds if state == "ready" else 0.0
        self._send({"program_id": program_id, "state": state, "seconds": seconds}, connection)

    def report(self, problem: str) -> None:
        """Sends the front end the reason why this worker ends."""
        if self._connection is not None:
            self._send({"failure": problem[:MAX_PROBLEM]}, self._connection)

    def _send(self, message: dict[str, Any], connection: socket.socket) -> None:
        with self._writing, contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

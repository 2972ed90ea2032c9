"""Between the server's process and the workers: programs on their way into host memory, off the step loop.

vLLM answers ``collective_rpc`` between steps only, so that a load would cost several steps. So each worker on the front
end's host listens at a Unix socket in a directory that only this user can enter, and answers when a load is over. Both
ends send lines of JSON: ``{"load": id, "path": …, "sha256": …}`` is answered by ``{"program_id": id, "state": …,
"seconds": …}``, the state being ``ready``, or ``failed: `` or ``damaged: `` and the reason; ``{"drop": id}`` by
nothing; ``{"failure": …}`` is the reason why the worker ends.
"""

"""What the fork server imports: all that an engine's processes would, and no plugin, which could start threads."""

import gc

from deltamux.child_process import block_signals_of_group

block_signals_of_group()
gc.disable()  # imports make a million objects that stay

from vllm.utils.system_utils import set_process_title  # noqa: E402

set_process_title("ForkServer", prefix="deltamux")

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.executor.multiproc_executor  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import deltamux.engine.vllm.scheduling.scheduler  # noqa: E402
import deltamux.engine.vllm.worker.cpu  # noqa: E402, F401

gc.freeze()  # so that no fork's collection writes to shared pages
gc.enable()

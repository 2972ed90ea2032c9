"""The calls of vLLM's model runner to a LoRA manager besides loading: profiling and capturing run as the base."""

from collections.abc import Iterator
from contextlib import contextmanager


class LoRAManagerInterface:
    """The methods of vLLM's ``LRUCacheWorkerLoRAManager`` that have no adapters to handle here."""

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: object, rank: int) -> bool:
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False

"""What a GPU would have to wait for, seen without one: on torch's meta device, a stand-in that has no memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DeviceTransfers(TorchDispatchMode):
    """Notes every op between memory of the host and the meta device. Reading a value of that device raises by itself.

    Attributes:
        ops: names, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {leaf.is_meta for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if len(places) > 1:
            self.ops.append(str(func))
        return result

"""Methods made of methods: the parts' tensors keep their names, behind the name of the part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


class Part(Mapping[str, Tensor]):
    """The tensors of one part under their own names; asking for one asks the whole, which notes it."""

    def __init__(self, name: str, whole: Mapping[str, Tensor]) -> None:
        self._prefix = f"{name}."
        self._whole = whole

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def behind(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's tensors or declarations under the whole's names."""
    return {f"{name}.{key}": value for key, value in values.items()}

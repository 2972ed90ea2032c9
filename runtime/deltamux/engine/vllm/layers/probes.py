"""`Probes`: whether a module of the loaded model computes what the checkpoint's tensor of a site says.

vLLM's loaders rename, fuse, reorder and scale what a checkpoint holds, each model in its own way. A name is therefore
only a guess: the module's outputs for random inputs are compared with products of rows of the checkpoint, which holds
for packed and quantised weights alike, and a module is found by them where no name leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltamux.deltas import EmbeddingSite, HeadSite, LinearSite, NormSite
from deltamux.deltas.backends.module_batch import ColumnRange
from deltamux.deltas.ops.norm_affine import normalise
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import QuantisedBaseError

INPUTS = 4
"""Random inputs per module: a row of another weight differs in one of them by more than any rounding."""
RUNS, RUN = 16, 4
"""Rows that are compared, as runs spread evenly over a weight: a loader that moves any tenth of them moves one."""
TOLERANCE = 0.1
"""Largest difference of a row's outputs from the checkpoint's, relative to their size; bfloat16 differs by 0.01."""
QUANTISED_TOLERANCE = 0.6
"""The same for a quantised base; another weight's outputs differ by 1.4."""
QUANTISED_SHARE = 0.9
"""Share of a quantised projection's outputs that have to agree: without VNNI, products of 8 bits overflow in some."""


CHUNK = 1024
"""Outputs that are compared with all others at once."""


class ProbeError(Exception):
    """A module does not compute what the site says; the message is a reason that a tenant may read."""


class _Outputs(NamedTuple):
    """Random inputs [INPUTS, in_features] and what a linear returns for them, less its bias, in float32."""

    x: Tensor
    y: Tensor


class Probes:
    """Compares modules with the checkpoint.

    Args:
        files: the checkpoint; None where the engine has none (random weights), and names are all there is.
        quantised: whether the engine holds weights at a lower precision than their dtype. Projections whose checkpoint
            has packed weights alone are taken by name.

    Attributes:
        files: as given.
    """

    def __init__(self, files: WeightFiles | None, dtype: torch.dtype, device: torch.device, *, quantised: bool) -> None:
        self.files = files
        self._dtype, self._device = dtype, device
        self._quantised = quantised
        self._tolerance = QUANTISED_TOLERANCE if quantised else TOLERANCE
        self._outputs: dict[nn.Module, _Outputs] = {}

    def check_linear(self, site: LinearSite, module: nn.Module, columns: ColumnRange) -> Tensor | None:
        """Compares these outputs of a linear with those of the site's weight.

        Returns:
            The order in which vLLM holds them: its output i is the site's output order[i]; None for the site's own.
        Raises:
            ProbeError: they are not those of the site's weight, in any order.
        """
        if self.files is None or self._is_packed(site):
            return None
        rows = _sample(site.out_features)
        x, y = self._run(module, site.in_features)
        expected = x @ self._rows(site, rows).T
        found = y[:, columns.first : columns.first + columns.size]
        if self._same(found[:, rows], expected):
            return None
        if self._same(found[:, _nearest(expected, found)], expected):
            every = x @ self._rows(site, torch.arange(site.out_features)).T
            order = _nearest(found, every)
            if len(set(order.tolist())) == len(order) and self._same(found, every[:, order]):
                return order
        raise ProbeError(f"vLLM's counterpart of {site.name} computes something else than the checkpoint's weight")

    def find_linear(self, site: LinearSite, candidates: Mapping[str, nn.Module]) -> tuple[str, ColumnRange] | None:
        """Returns the path and the columns of the one linear that holds a site's weight; None where there is none."""
        if self.files is None or self._is_packed(site):
            return None
        rows = _sample(site.out_features)
        weight = self._rows(site, rows)
        for path, module in candidates.items():
            try:
                x, y = self._run(module, site.in_features)
            except ProbeError:
                continue
            expected = x @ weight.T
            first = int(_nearest(expected[:, :1], y)[0]) - int(rows[0])
            if 0 <= first <= y.shape[1] - site.out_features and self._same(y[:, first + rows], expected):
                return path, ColumnRange(first, site.out_features)
        return None

    def check_dtype(self, site: LinearSite, module: nn.Module) -> None:
        """Raises ProbeError where a linear returns another dtype than the engine's, as routers may."""
        with torch.inference_mode():
            y = module(self._zeros(site.in_features))
        found = (y[0] if isinstance(y, tuple) else y).dtype
        if found != self._dtype:
            raise ProbeError(f"vLLM computes {site.name} in {found}, and deltas are in {self._dtype} here")

    def check_norm(self, site: NormSite, module: nn.Module) -> bool:
        """Returns whether a norm that is given a residual adds it to its input first.

        Raises:
            ProbeError: its output is not the site's normalised input times the checkpoint's weight.
        """
        x = self._random(INPUTS, site.features)
        x[0] *= 0.01  # where the norm's epsilon counts
        try:
            with torch.inference_mode():
                y = module(x)
        except Exception as error:
            raise ProbeError(f"vLLM's counterpart of {site.name} does not run as a norm: {error}") from error
        y, normalised = (y[0] if isinstance(y, tuple) else y).float(), normalise(x, site)
        bias = torch.zeros_like(y[0]) if not site.has_bias else self._vector(site, "bias", y[0])
        gain = ((y - bias) * normalised).sum(0) / normalised.square().sum(0)
        if not self._same(y, normalised * gain + bias):
            raise ProbeError(f"vLLM's counterpart of {site.name} does not normalise as the base does")
        weight = self._vector(site, "weight", gain)
        if not (self._same(gain, weight) or self._same(gain, weight + 1)):
            raise ProbeError(f"vLLM's counterpart of {site.name} holds another weight than the checkpoint")
        return self._adds_residual(module, x)

    def _adds_residual(self, module: nn.Module, x: Tensor) -> bool:
        try:
            with torch.inference_mode():
                output = module(x.clone(), x.clone())  # some norms change what they are given
        except TypeError:
            return False  # it takes no residual
        return isinstance(output, tuple) and output[1] is not None and self._same(output[1], 2 * x)

    def embedding_scale(self, site: EmbeddingSite, module: nn.Module) -> float:
        """Returns by how much the base's embeddings are larger than what vLLM's module returns.

        Raises:
            ProbeError: they are no multiples of each other.
        """
        if self.files is None:
            return 1.0
        ids = torch.linspace(0, site.vocab_size - 1, min(site.vocab_size, RUNS)).long()
        with torch.inference_mode():
            found = module(ids.to(self._device)).float().cpu()
        stored = self._stored(f"{site.name}.weight", ((int(i), int(i) + 1) for i in ids))
        expected = stored * site.scale
        factor = float((expected * found).sum() / found.square().sum().clamp(min=1e-30))
        if not self._same(found * factor, expected):
            raise ProbeError(f"vLLM's counterpart of {site.name} returns something else than the checkpoint's rows")
        # Rounding of the sample is no scale.
        return 1.0 if abs(factor - 1) < 0.01 else factor

    def check_head(self, site: HeadSite, project: Callable[[Tensor], Tensor]) -> None:
        """Raises ProbeError unless `project` multiplies by the head's weight, or that of the embedding it shares."""
        if self.files is None:
            return
        x, rows = self._random(INPUTS, site.in_features), _sample(site.vocab_size)
        with torch.inference_mode():
            found = project(x).float().cpu()
        name = site.tied_to or site.name
        weight = self._stored(f"{name}.weight", _runs(rows))
        if found.shape[1] < site.vocab_size or not self._same(found[:, rows], x.float().cpu() @ weight.T):
            raise ProbeError(f"vLLM's output head computes something else than the checkpoint's {name}")

    def _run(self, module: nn.Module, in_features: int) -> _Outputs:
        # vLLM's kernels do not check the width of what they read, and write past its end where it is too narrow.
        taken = _width(module)
        if taken is not None and taken != in_features:
            raise ProbeError(f"vLLM's module takes {taken} features, and the base's {in_features}")
        if module not in self._outputs:
            x = torch.cat([self._random(INPUTS, in_features), self._zeros(in_features)])
            try:
                with torch.inference_mode():
                    y = module(x)
            except Exception as error:
                raise ProbeError(f"vLLM's module does not run on its own: {type(error).__name__}: {error}") from error
            y = (y[0] if isinstance(y, tuple) else y).float().cpu()
            self._outputs[module] = _Outputs(x[:INPUTS].float().cpu(), y[:INPUTS] - y[INPUTS])
        return self._outputs[module]

    def _is_packed(self, site: LinearSite) -> bool:
        """Returns whether the checkpoint stores a weight quantised in a form of which no values can be read."""
        assert self.files is not None
        try:
            self.files.rows(f"{site.name}.weight", 0, 1)
        except QuantisedBaseError:
            return True
        except KeyError:
            return self._quantised
        return False

    def _rows(self, site: LinearSite, rows: Tensor) -> Tensor:
        """Returns rows of a site's weight [len(rows), in_features], in float32."""
        return self._stored(f"{site.name}.weight", _runs(rows), transposed=site.transposed)

    def _stored(self, name: str, runs: Iterable[tuple[int, int]], *, transposed: bool = False) -> Tensor:
        """Returns rows of a weight of the checkpoint, given as runs of (first, stop), in float32."""
        assert self.files is not None
        try:
            read = [self.files.rows(name, first, stop, transposed=transposed) for first, stop in runs]
        except KeyError:
            raise ProbeError(f"the checkpoint has no {name} to compare vLLM's module with") from None
        return torch.cat(read).float()

    def _vector(self, site: NormSite, field: str, otherwise: Tensor) -> Tensor:
        if self.files is None:
            return otherwise
        try:
            return self.files.read(f"{site.name}.{field}").float().to(otherwise.device)
        except KeyError:
            raise ProbeError(f"the checkpoint has no {site.name}.{field} to compare vLLM's module with") from None

    def _same(self, found: Tensor, expected: Tensor) -> bool:
        """Returns whether the columns agree, relative to their size or a tenth of the largest; see QUANTISED_SHARE."""
        if found.shape != expected.shape:
            return False
        found, expected = (t.float().reshape(-1, t.shape[-1]) for t in (found, expected))
        sizes = expected.norm(dim=0)
        agree = (found - expected).norm(dim=0) <= self._tolerance * sizes.clamp(min=float(sizes.max()) / 10)
        return float(agree.float().mean()) >= (QUANTISED_SHARE if self._quantised else 1.0)

    def _random(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(self._dtype).to(self._device)

    def _zeros(self, features: int) -> Tensor:
        return torch.zeros(1, features, dtype=self._dtype, device=self._device)


def _width(module: Any) -> int | None:
    """Returns how many features a linear of vLLM's, or of torch's, takes; None of a module that does not say."""
    names = ("input_size_per_partition", "input_size", "in_features")
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), None)


def _sample(count: int) -> Tensor:
    """Returns the indices of the rows that are compared, of so many."""
    if count <= RUNS * RUN:
        return torch.arange(count)
    starts = torch.linspace(0, count - RUN, RUNS).long()
    return (starts[:, None] + torch.arange(RUN)).flatten()


def _runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Yields (first, stop) of the runs of consecutive indices in sorted `rows`."""
    breaks = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    for first, stop in pairwise(breaks):
        yield int(rows[first]), int(rows[stop - 1]) + 1


def _nearest(expected: Tensor, found: Tensor) -> Tensor:
    """Returns, for each column of `expected`, the index of the column of `found` that is nearest to it."""
    parts = (expected.T[first : first + CHUNK] for first in range(0, expected.shape[1], CHUNK))
    return torch.cat([torch.cdist(part, found.T).argmin(dim=1) for part in parts])


def layer_of(path: str) -> int | None:
    """Returns the first number in a module's path, the index of its layer."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)

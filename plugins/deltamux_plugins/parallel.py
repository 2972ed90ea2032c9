"""The parallel adapter (He et al. 2021, https://arxiv.org/abs/2110.04366): a bottleneck next to every feed-forward.

    y += s (W_up f(W_down x + b_down) + b_up)   with x the feed-forward's input, so that both run side by side

Served as one parallel `Bottleneck` per layer. The paper scales by s = 4 and uses ReLU.
"""

from dataclasses import dataclass

from deltamux.deltas import BlockRole
from deltamux_plugins.bottlenecks import BottleneckConfig, BottleneckMethod


@dataclass(frozen=True)
class ParallelConfig(BottleneckConfig):
    """A `BottleneckConfig` with the paper's scale and activation."""

    activation: str = "relu"
    scale: float = 4.0


METHOD = BottleneckMethod(
    name="parallel",
    title="Parallel adapter",
    summary="a bottleneck next to the feed-forward of every layer",
    paper="https://arxiv.org/abs/2110.04366",
    roles=(BlockRole.FEED_FORWARD,),
    parallel=True,
    config_class=ParallelConfig,
)

"""Adapter tuning after Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247): one bottleneck per layer.

    y += s (W_up f(W_down y + b_down) + b_up)   after the feed-forward of every layer; norms stay as they are

Served as one `Bottleneck` per layer. The files are those of `houlsby`, with half of its tensors.
"""

from deltamux.deltas import BlockRole
from deltamux_plugins.bottlenecks import BottleneckMethod

METHOD = BottleneckMethod(
    name="pfeiffer",
    title="Adapter tuning (Pfeiffer)",
    summary="a bottleneck after the feed-forward of every layer",
    paper="https://arxiv.org/abs/2005.00247",
    roles=(BlockRole.FEED_FORWARD,),
)

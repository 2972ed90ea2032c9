"""The MAM adapter: a prefix before every attention, and a parallel adapter next to every feed-forward.

He et al. 2021, https://arxiv.org/abs/2110.04366.

Served as the ops of `prefix` and `parallel`, whose configs it holds, and whose tensors keep their names after
``prefix.`` and ``parallel.``.
"""

from dataclasses import dataclass, field

from deltamux.hookspecs import MethodInfo
from deltamux_plugins import parallel, prefix
from deltamux_plugins.composites import CompositeMethod
from deltamux_plugins.configs import VersionedConfig
from deltamux_plugins.parallel import ParallelConfig
from deltamux_plugins.prefix import PrefixConfig


@dataclass(frozen=True)
class MAMConfig(VersionedConfig):
    """The configs of both components."""

    prefix: PrefixConfig = field(default_factory=lambda: PrefixConfig(prefix_projection=True))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


METHOD = CompositeMethod(
    MethodInfo(
        name="mam",
        title="MAM adapter",
        summary="prefix before every attention, bottleneck next to every feed-forward",
        paper="https://arxiv.org/abs/2110.04366",
        peft_type="DELTAMUX_MAM",
        config_class=MAMConfig,
        merges=False,
        in_peft=False,
        learning_rate=2e-3,
        learning_rate_source="between its components': adapters 1e-3, prefixes 5e-3",
        learning_rate_width=1024,
    ),
    {"prefix": prefix, "parallel": parallel.METHOD},
    not_merged="neither its prefix nor its bottlenecks are changes of weights",
)

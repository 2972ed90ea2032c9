"""Ops whose module reads its weight itself: while it runs, it has the merged weight, through which gradients flow.

The experts of a mixture compute in one of several ways (transformers' ``experts_implementation``), and a router returns
more than its product: in both, the weight is what all ways share.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamux.deltas.ops import Op
from deltamux.deltas.sites import ExpertsSite, LinearSite


def hook_weights(
    site: ExpertsSite | LinearSite,
    modules: Mapping[str, nn.Module],
    ops: Callable[[ExpertsSite | LinearSite], Iterable[Op]],
) -> list[RemovableHandle]:
    """Makes the module of a site compute with the weights that the ops of the site change.

    Args:
        modules: of the model, by path.
        ops: returns the site's ops in the forward pass that is running.
    """
    path = site.module if isinstance(site, ExpertsSite) else site.name
    module = modules[path]
    changed: list[str] = []

    def read(name: str) -> Tensor:
        field = name.removeprefix(f"{path}.")
        found: Tensor | None = module.__dict__.get(field, module._parameters.get(field))
        if found is None:
            raise KeyError(name)
        return found

    def change(module: nn.Module, args: Any) -> None:
        # An attribute of the instance is found before the parameter of that name, which stays where it is.
        for op in ops(site):
            for name, tensor in op.merge(site, read).items():
                changed.append(name.removeprefix(f"{path}."))
                module.__dict__[changed[-1]] = tensor.to(read(name).dtype)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        while changed:
            module.__dict__.pop(changed.pop(), None)

    return [
        module.register_forward_pre_hook(change),
        module.register_forward_hook(restore, always_call=True),
    ]

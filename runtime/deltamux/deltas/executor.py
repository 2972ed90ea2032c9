"""The reference executor: attaches a program to a Hugging Face model with forward hooks; torch only.

Trainers train through it, evaluation runs it without the engine, and parity tests hold the engine against it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamux.deltas.base_model import BaseModel
from deltamux.deltas.ops import KVPrefix, Op, SoftPrompt
from deltamux.deltas.program import Program
from deltamux.deltas.sites import BlockSite, ExpertsSite, LinearSite, Site, SiteKind
from deltamux.deltas.weight_hooks import hook_weights

SiteKey = tuple[SiteKind, str]


class Attachment:
    """A program that is attached to a model, until `detach`.

    Args:
        model: a Hugging Face causal model.
        program: the program; or, while training, a function that builds it from the trained parameters in every forward
            pass, so that gradients reach them.
    """

    def __init__(self, model: nn.Module, base: BaseModel, program: Program | Callable[[], Program]) -> None:
        self.model = model
        self._build: Callable[[], Program] = (lambda: program) if isinstance(program, Program) else program
        self._ops: dict[SiteKey, list[Op]] = {}
        self._block_inputs: dict[str, Tensor] = {}
        self._residuals: dict[str, Tensor] = {}
        self._num_virtual_tokens = 0
        self._cut = 0
        self._num_own_tokens = 0
        self._handles: list[RemovableHandle] = []
        with torch.no_grad():
            first = self._build()
        self._hook({(site.kind, site.name): site for site, _ in first.placed(base)}, first.num_virtual_tokens > 0)

    def detach(self) -> None:
        """Removes every hook; the model is the base again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _refresh(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        program = self._build()
        self._ops = {}
        for name, op in program:
            self._ops.setdefault((op.site_kind, name), []).append(op)
        self._num_virtual_tokens = program.num_virtual_tokens
        return args, kwargs

    def _hook(self, sites: Mapping[SiteKey, Site], has_virtual_tokens: bool) -> None:
        modules = dict(self.model.named_modules())
        self._handles.append(self.model.register_forward_pre_hook(self._refresh, with_kwargs=True))
        if has_virtual_tokens:
            self._handles.append(self.model.register_forward_pre_hook(self._put_virtual_tokens, with_kwargs=True))
            self._handles.append(self.model.register_forward_hook(self._cut_virtual_logits))
        # Blocks come last: at an output projection, the projection's own ops apply before the sub-layer's.
        for site in sorted(sites.values(), key=lambda s: s.kind is SiteKind.BLOCK):
            if isinstance(site, BlockSite):
                self._hook_block(site, modules)
            elif isinstance(site, ExpertsSite) or (isinstance(site, LinearSite) and site.is_router):
                self._handles += hook_weights(site, modules, lambda site: self._ops[site.kind, site.name])
            elif site.kind is not SiteKind.ATTENTION:
                self._handles.append(modules[site.name].register_forward_pre_hook(self._hook_input(site)))
                self._handles.append(modules[site.name].register_forward_hook(self._hook_output(site)))

    def _hook_input(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            for op in self._ops[site.kind, site.name]:
                x = op.apply_input(x, site) if op.changes_input else x
            return (x, *args[1:])

        return hook

    def _hook_output(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._apply(site, args[0], output, module.training)

        return hook

    def _hook_block(self, site: BlockSite, modules: Mapping[str, nn.Module]) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._block_inputs[site.name] = args[0]

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = self._block_inputs.pop(site.name).view_as(output)
            residual = self._residuals.pop(site.name, None)
            return self._apply(site, x, output, module.training, residual)

        def keep_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._residuals[site.name] = args[0]

        if site.norm:
            self._handles.append(modules[site.norm].register_forward_pre_hook(keep_residual, prepend=True))
        self._handles.append(modules[site.input_module].register_forward_pre_hook(keep))
        self._handles.append(modules[site.output_module].register_forward_hook(hook))

    def _apply(self, site: Site, x: Tensor, y: Tensor, training: bool, residual: Tensor | None = None) -> Tensor:
        for op in self._ops[site.kind, site.name]:
            if op.reads_residual:
                assert residual is not None, f"the norm before {site.name} has not run"
                y = op.apply(residual.view_as(y), y, site, training=training)
            else:
                y = op.apply(x, y, site, training=training)
        return y

    def _put_virtual_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Puts virtual tokens before the prompt, once per sequence, and counts them in the mask and the positions.

        A prefix goes into the empty cache; a soft prompt goes before the first tokens' embeddings.
        """
        from transformers import DynamicCache

        if args:
            kwargs["input_ids"], args = args[0], args[1:]
        tokens: Tensor = kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = DynamicCache()
        begins = cache.get_seq_length() == 0
        self._fill(cache, tokens.shape[0]) if begins else None
        soft = self._soft_prompts() if begins else []
        self._cut = self._num_virtual_tokens if soft else 0
        self._num_own_tokens = tokens.shape[1]
        n = self._num_virtual_tokens
        mask = kwargs.get("attention_mask")
        if (
            mask is not None
            and mask.dim() == 2
            and mask.shape[1] < cache.get_seq_length() + self._cut + tokens.shape[1]
        ):
            kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None:
            own = torch.arange(self._cut, device=positions.device).expand(positions.shape[0], -1)
            kwargs["position_ids"] = torch.cat([own, positions + n], dim=1)
        if soft:
            embedded = module.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]  # transformers'
            front = [op.embedding.to(embedded.dtype).expand(tokens.shape[0], -1, -1) for op in soft]
            kwargs["inputs_embeds"] = torch.cat([*front, embedded], dim=1)
        return args, kwargs

    def _cut_virtual_logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Leaves only the logits of the caller's own tokens (of the last ones, where no more were requested)."""
        if self._cut:
            output.logits = output.logits[:, -self._num_own_tokens :]
        return output

    def _soft_prompts(self) -> list[SoftPrompt]:
        return [op for ops in self._ops.values() for op in ops if isinstance(op, SoftPrompt)]

    def _fill(self, cache: Any, batch: int) -> None:
        prefixes = [(name, op) for (_, name), ops in self._ops.items() for op in ops if isinstance(op, KVPrefix)]
        dtype = next(self.model.parameters()).dtype
        for name, op in prefixes:
            key, value = (t.to(dtype).transpose(0, 1).expand(batch, -1, -1, -1) for t in (op.key, op.value))
            cache.update(key, value, _layer_of(name))


def _layer_of(attention_site: str) -> int:
    return int(attention_site.split(".")[1])


@contextmanager
def attached(model: nn.Module, base: BaseModel, program: Program | Callable[[], Program]) -> Iterator[Attachment]:
    """Attaches a program for the length of a block; see `Attachment`."""
    attachment = Attachment(model, base, program)
    try:
        yield attachment
    finally:
        attachment.detach()

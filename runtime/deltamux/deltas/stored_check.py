"""Whether a base's files hold the weights of all its sites, in the shapes that its config.json calls for.

vLLM starts without some that are missing (one of several projections that it packs, an output head), and then computes
with whatever is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from deltamux.deltas.sites import EmbeddingSite, ExpertsSite, HeadSite, LinearSite, NormSite, Site
from deltamux.deltas.weights import WeightFiles
from deltamux.errors import FailedPreconditionError

COPY_AGAIN = "copy or download the base again"


def check_architecture(config: Any) -> None:
    """Raises FailedPreconditionError, BASE_DAMAGED, where `architectures` names a model of another `model_type`.

    vLLM runs the one, and transformers, which PEFT trains on, the other.
    """
    import transformers

    for named in getattr(config, "architectures", None) or ():
        kind = getattr(getattr(transformers, named, None), "config_class", None)
        if kind is None or isinstance(config, kind) or isinstance(config.get_text_config(), kind):
            return  # the first that is known counts; a model's own code may name any
        if kind.model_type != config.model_type:
            raise FailedPreconditionError(
                f"the config.json of the base model names {named} in architectures, which vLLM would run, and "
                f"{config.model_type!r} as its model_type, which transformers builds: correct one of them",
                reason="BASE_DAMAGED",
                metadata={"architecture": named, "model_type": str(config.model_type)},
            )


def check_stored(sites: Iterable[Site], files: WeightFiles) -> None:
    """Raises FailedPreconditionError for the first weight that is missing or has another shape.

    Its reason is BASE_INCOMPLETE for the one, and BASE_DAMAGED for the other.
    """
    for site in sites:
        for name, expected in _weights(site):
            try:
                found = files.shape(name)
            except KeyError:
                problem = f"the base model's files lack {name}: {_remedy(site)}"
                raise FailedPreconditionError(problem, reason="BASE_INCOMPLETE", metadata={"tensor": name}) from None
            if expected is not None and found not in (None, expected):
                raise FailedPreconditionError(
                    f"{name} of the base model has shape {found}, and config.json says {expected}: {COPY_AGAIN}",
                    reason="BASE_DAMAGED",
                    metadata={"tensor": name},
                )


def _weights(site: Site) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Yields the names and shapes of a site's weights; None for a shape that files may have in parts."""
    if isinstance(site, LinearSite):
        ends = (site.out_features, site.in_features)
        yield f"{site.name}.weight", ends[::-1] if site.transposed else ends
    elif isinstance(site, NormSite):
        yield f"{site.name}.weight", (site.features,)
    elif isinstance(site, EmbeddingSite):
        yield f"{site.name}.weight", (site.vocab_size, site.features)
    elif isinstance(site, HeadSite) and site.tied_to is None:
        yield f"{site.name}.weight", (site.vocab_size, site.in_features)
    elif isinstance(site, ExpertsSite):
        yield site.name, None
    if isinstance(site, LinearSite | NormSite) and site.has_bias:
        yield f"{site.name}.bias", (site.out_features if isinstance(site, LinearSite) else site.features,)


def _remedy(site: Site) -> str:
    if isinstance(site, HeadSite):
        return "it was saved as a classifier, or as a model without an output head; take the causal language model"
    return COPY_AGAIN

"""A sample of the table of bases (`make bases` runs all): exact, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from bases.__main__ import IMAGES_MARK, MARK, lacks, write_page
from bases.check import EXACT, KINDS, check_base
from bases.configs import BASES, base_config, save_base
from deltamux.deltas import BaseModel

PEFT_MAKES_NO_IA3 = {"ia3": "PEFT makes none"}
NO_EXPERTS = {"experts": "PEFT makes none"}
SAMPLE = {
    "olmo2": {**PEFT_MAKES_NO_IA3, **NO_EXPERTS},  # runs on vLLM's backend for transformers' models
    "qwen3_moe": PEFT_MAKES_NO_IA3,  # PEFT takes router and experts for all-linear
    "gpt_oss": PEFT_MAKES_NO_IA3,  # its experts are stored transposed, with biases and an activation of their own
    "bloom": NO_EXPERTS,  # vLLM reorders the rows of its projections, and PEFT's names are not vLLM's
    # Its language model has other names on the disk, in transformers and in vLLM; PEFT takes what reads images, too.
    "gemma3": {**PEFT_MAKES_NO_IA3, **NO_EXPERTS, "all-linear": "refused: "},
}
"""What is not exact, by kind: the beginning of what is said instead."""


WITH_OTHER_MIXERS = {"mamba": 0, "granitemoehybrid": 1, "qwen3_next": 1, "qwen3_5": 1, "lfm2_vl": 1}
"""How many of the two layers have attention."""


@pytest.mark.engine
@pytest.mark.parametrize("name", SAMPLE)
def test_a_base_serves_what_peft_and_transformers_compute_or_says_why_not(name: str, tmp_path: Path) -> None:
    if why := lacks(name):
        pytest.skip(why)
    found = check_base(save_base(tmp_path / "base", name), tmp_path, eager=True)
    assert found.keys() == {"base", *KINDS}
    others = {kind: outcome for kind, outcome in found.items() if outcome != EXACT}
    assert others.keys() == SAMPLE[name].keys(), others
    assert all(outcome.startswith(SAMPLE[name][kind]) for kind, outcome in others.items()), others


@pytest.mark.parametrize("name", BASES)
def test_every_base_has_sites_of_every_kind_that_its_architecture_has(name: str) -> None:
    base = BaseModel.from_config(base_config(name))
    assert base.linears
    assert bool(base.blocks) == (name != "mamba")
    assert bool(base.norms) == (name != "olmo"), "OLMo's norms have no weights"
    assert len(base.attentions) == WITH_OTHER_MIXERS.get(name, 2)


def test_a_page_keeps_the_table_of_bases_that_were_not_tried(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n{IMAGES_MARK}\n\nold\n\n## B\n\ntext {MARK}\n\nold\n")
    write_page(page, {"llama": {"base": EXACT}})
    first, _, second = page.read_text().partition("\n## B\n\ntext ")
    assert first == f"# A\n{IMAGES_MARK}\n\nold\n"
    assert "| llama | exact |" in second
    write_page(page, {"gemma3": {"base": EXACT}})
    first, _, again = page.read_text().partition("\n## B\n\ntext ")
    assert "| gemma3 | exact |" in first
    assert "old" not in first
    assert again == second

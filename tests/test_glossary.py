"""docs/glossary.md is held to the code: each word names something that exists, and old words do not come back."""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(deltamux[\w.]+)` \|$", GLOSSARY, re.MULTILINE)

RETIRED = re.compile(
    r"\b(LinearPort|NormPort|KernelLanes|DeltaLanes|LoaderLink|HostTier|Residency|TurnMixin|StepTable|Dominance"
    r"|FoldedStep|KernelDeltaManager|WholeLanes|has_kernel|lay_out|stand_in|rehearse|AroundInterceptor"
    r"|errors_become_statuses|everybody_is_administrator|key_decides|PacedCalls|CheckedRequests|kept_upload"
    r"|ClaimedTensors|GuidedDecoding)\b"
)
"""Names that the code base had before the field's words replaced them."""


def resolve(name: str) -> object:
    """Returns what a dotted name names: a module, or what one has."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[cut:], module)
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize(("word", "name"), [(word, name) for word, _, name in ROWS])
def test_a_word_of_the_glossary_names_what_is_there(word: str, name: str) -> None:
    assert resolve(name) is not None, word


def test_the_glossary_has_each_word_once_in_a_sentence_or_two() -> None:
    words = [word for word, _, _ in ROWS]
    assert len(words) == len(set(words)) >= 40
    for word, text, _ in ROWS:
        assert len(text.split()) <= 45, f"{word}: too long"


def test_retired_names_do_not_come_back() -> None:
    places = [ROOT / "runtime", ROOT / "plugins", ROOT / "trainers", ROOT / "tests", ROOT / "docs", ROOT / "README.md"]
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*")) if f.is_file()]
    texts = {
        f: f.read_text(encoding="utf-8")
        for f in files
        if f.suffix in {".py", ".md", ".cpp", ".h"} and f != Path(__file__).resolve()
    }
    assert not {str(f.relative_to(ROOT)): found for f, text in texts.items() if (found := RETIRED.findall(text))}

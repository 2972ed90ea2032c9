"""Links, anchors, paths and names in the documentation lead somewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from deltamux_testing.pages import DOCS, PAGES, ROOT, anchors, links, spans, text

FOLDERS = tuple(
    f"{path.name}/"
    for place in (ROOT, ROOT / "runtime" / "deltamux")
    for path in place.iterdir()
    if path.is_dir() and not path.name.startswith(".")
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=name)
def test_a_page_of_the_site_links_to_the_site_alone(page: Path) -> None:
    local = [target.partition("#")[0] for target in links(page) if not re.match(r"[a-z]+:", target)]
    assert not [t for t in local if t and not (page.parent / t).resolve().is_relative_to(DOCS)]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_every_path_in_a_page_is_there(page: Path) -> None:
    """Spans of code that name a file or a folder, from the root, `runtime/deltamux/` or the page's folder on."""
    places = (ROOT, ROOT / "runtime" / "deltamux", page.parent)
    paths = [span for span in spans(page) if re.fullmatch(r"[\w./-]+", span) and span.startswith(FOLDERS)]
    assert not [path for path in paths if "NAME" not in path and not any((place / path).exists() for place in places)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_module_that_is_run_is_there(page: Path) -> None:
    modules = set(re.findall(r"python -m ((?:benchmarks|storms|fuzz|deltamux\w*)[\w.]*)", text(page)))
    modules |= {span for span in spans(page) if re.fullmatch(r"benchmarks(\.\w+)+", span)}
    assert not [module for module in modules if find_spec(module) is None]


def test_every_page_is_in_the_sites_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["strict"]


def test_every_decision_is_listed_has_what_why_and_when_and_fits_a_screen() -> None:
    folder = DOCS / "decisions"
    pages = [page for page in folder.glob("*.md") if page.name != "README.md"]
    assert {page.name for page in pages} == set(links(folder / "README.md"))
    for page in pages:
        assert re.search(r"^\*Decided \d{4}-\d\d-\d\d\.\*$", text(page), re.MULTILINE), page.name
        assert all(f"**{part}.**" in text(page) for part in ("What", "Why", "Cost")), page.name
        assert len(text(page).splitlines()) <= 40, f"{page.name} is longer than a screen"

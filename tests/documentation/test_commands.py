"""Blocks of the documentation are what can be run: commands parse, and Python runs or a comment says why not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deltamux.cli import parser
from deltamux_testing.pages import DOCS, PAGES, ROOT, Block, blocks

COMMANDS = [block for page in PAGES for block in blocks(page, "bash")]
EXECUTED = {
    ROOT / "README.md": "tests/server/test_examples.py, tests/plugins/test_docs.py",
    DOCS / "quickstart.md": "tests/server/test_examples.py",
    DOCS / "plugins" / "tutorial.md": "tests/plugins/test_docs.py: the blocks are the example's files",
}
"""Pages whose Python blocks run in tests, and where."""


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_every_command_is_one_of_the_command_line(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["deltamux"] or "demo" in words[1:2]:  # the demo's options are its own program's
            continue
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_every_target_of_make_is_there(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^make ([a-z][\w-]*)", block.text, re.MULTILINE)
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs_in_a_test_or_has_a_comment_with_the_reason(page: Path) -> None:
    if page not in EXECUTED:
        assert not [str(block) for block in blocks(page, "python") if block.runs]

"""Every Python block of the documentation pages runs, and every page and object that they name is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_code_runs(page):
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        exec(block, namespace)


def test_objects_that_pages_describe_are_there_and_have_a_docstring():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]
    assert len(names) == len(set(names)) > 40
    for name in names:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            parent, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(parent), attribute)
        assert found.__doc__, name


def test_every_page_is_in_the_menu_and_links_lead_somewhere():
    menu = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    assert menu == {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    for page in (*PAGES, ROOT / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

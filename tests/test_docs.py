"""Links in the documents have a target, and every document is linked."""

import re
from pathlib import Path

import pytest

from vitcop_vllm.engine.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page: Path) -> None:
    links = LINK.findall(page.read_text())
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_linked() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for page in PAGES[1:]:
        assert f"{page.name}" in text, f"no page links to {page.name}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_tables_of_models_have_every_family(family: Family) -> None:
    compatibility = (ROOT / "docs" / "compatibility.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(family.name)} .*$", compatibility, re.MULTILINE)
    assert ("[CLS]" in row) == family.has_cls
    assert all(decoder.split("_")[0] in row.lower() for decoder in family.decoders)
    assert family.name in (ROOT / "README.md").read_text()


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150

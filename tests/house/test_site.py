"""The site's reference has every public name, and the site's pages are those of the folder."""

import re
from pathlib import Path

import sdecontrol as sc

ROOT = Path(__file__).parents[2]
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def documented() -> list[str]:
    """The names that the pages of the reference take from docstrings."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE)]


def test_every_public_name_is_in_the_reference_once() -> None:
    names = [name.rsplit(".", 1)[1] for name in documented()]
    public = {name for name in sc.__all__ if name not in ("library", "metrics")}
    in_modules = {name for name in (*sc.metrics.__all__, *sc.library.__all__) if name.islower()}
    assert sorted(set(names)) == sorted(names)
    assert not (public | in_modules) - set(names)


def test_every_page_has_a_place_in_the_navigation() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    told = re.findall(r": ([\w/]+\.md)$", NAV, flags=re.MULTILINE)
    assert sorted(told) == sorted(page for page in pages if not page.endswith("_notes.md"))

"""The Python in README and docs runs and prints what its comments say; links and commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_readme_has_code():
    assert len(python_blocks(README)) >= 3


@pytest.mark.parametrize("page", [*filter(python_blocks, PAGES)], ids=lambda page: page.stem)
def test_python_blocks_run_in_order_and_print_their_comments(page, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\n".join(python_blocks(page))
    exec(code, {"__name__": page.stem})
    printed = capsys.readouterr().out.splitlines()
    comments = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    expected = [line for comment in comments for line in comment.split("; ")]
    if page.parent.name == "tutorials":  # They print more, which the site shows.
        printed = [line for line in printed if line in expected]
    assert printed == expected


@by_page
def test_every_command_named_exists(page):
    for module in set(re.findall(r"python -m (experiments\.\w+)", page.read_text())):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def anchors(page):
    """Yields the link fragments that GitHub and mkdocs make from a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


@by_page
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), target
        assert not fragment or fragment in anchors(leads_to), target


@by_page
def test_no_line_exceeds_100_characters(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert not long


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150

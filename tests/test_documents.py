"""Every Python block in README and docs runs, top to bottom, in one namespace a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for match in blocks:
        # So that an error points at the line of the page.
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)


def test_the_readme_has_a_python_block():
    assert BLOCK.search((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


SNIPPET = re.compile(r'--8<-- "([^":]+)')


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_is_included_from_files_that_exist(page):
    text = page.read_text()
    # A formatter that takes the mark for Python writes it with spaces, and then nothing is included.
    assert "8 <" not in text
    for target in SNIPPET.findall(text):
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("path", sorted(ROOT.joinpath("src/sparing/methods").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_method_has_a_card_that_includes_its_code(path):
    card = (ROOT / "docs" / "methods" / f"{path.stem}.md").read_text()
    assert f'--8<-- "src/sparing/methods/{path.name}"' in card
    assert f"methods/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"methods/{path.stem}.md" in (ROOT / "README.md").read_text()

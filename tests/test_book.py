"""The book: every notebook has its page, figures stay alive, links hold, terms are explained. (The whole of it is
`make book`.)"""

import re
import sys

import nbformat
import nbformat.v4 as v4
import plotly.graph_objects as go
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "book"))
import build

NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]


def test_the_contents_name_every_notebook_and_nothing_that_is_not_there(tmp_path):
    build.gather(tmp_path / "source")
    _, contents = (tmp_path / "source" / "index.md").read_text().split("```{toctree}", 1)
    entries = re.findall(r"^(?!:|```)(\S+)$", contents, re.MULTILINE)
    pages = [path.relative_to(tmp_path / "source").with_suffix("") for entry in entries
             for path in sorted((tmp_path / "source").glob(f"{entry}.*")) if path.suffix in (".md", ".ipynb")]
    assert [page.stem for page in pages if page.parent.name == "notebooks"] == NOTEBOOKS
    assert len(pages) == len({*pages})
    for entry in entries:
        assert [page for page in pages if page.match(entry)], f"{entry}: no such page"


def test_the_readme_names_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert sorted(set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", readme))) == NOTEBOOKS


def test_every_file_that_the_first_page_links_to_is_laid_out(tmp_path):
    build.gather(tmp_path)
    text = (tmp_path / "index.md").read_text()
    linked = {link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link}
    assert len(linked) > 10 and not [link for link in sorted(linked) if not (tmp_path / link).exists()]


def test_plotly_is_drawn_from_the_books_own_file_and_widgets_become_words():
    figure = {build.PLOTLY: go.Figure(go.Scatter(y=[1, 7])).to_plotly_json(), "text/plain": "Figure"}
    widget = {build.WIDGET: {"model_id": "0"}, "text/plain": "VBox(children=(HTML(value=...)))"}
    asked = {build.WIDGET: {"model_id": "1"}, "text/plain": "Why <b>?\n   ( ) so\n   ( ) or so"}
    cells = [v4.new_code_cell(outputs=[v4.new_output("display_data", data)]) for data in (figure, widget, asked)]
    before = v4.new_notebook(cells=cells)
    drawn, moved, quiz = (cell.outputs[0].data["text/html"] for cell in build.page(before).cells)
    assert 'src="../_static/plotly.min.js"' in drawn and "cdn" not in drawn and "[1,7]" in drawn
    assert "VBox" not in moved and "JupyterLab" in moved
    assert "Why &lt;b&gt;?" in quiz and "( ) or so" in quiz
    assert build.PLOTLY in before.cells[0].outputs[0].data  # the notebook itself stays


def test_links_to_folders_become_words_and_others_stay():
    text = "[profiles](profiles/), [`grids`](grids), [map](README.md), [site](https://example.org), [here](#data)"
    assert build.without_folders(text, ROOT) == \
        "profiles, `grids`, [map](README.md), [site](https://example.org), [here](#data)"


def test_broken_links_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="sub/b.html#x">1</a><a href="sub/b.html#y">2</a>'
                                     '<img src="gone.png"><a href="https://example.org/">3</a><a href="#top">4</a>')
    (tmp_path / "sub" / "b.html").write_text('<p id="x"></p><a href="../a.html">1</a><a href="c%20d.html#z">2</a>')
    (tmp_path / "sub" / "c d.html").write_text('<a name="z"></a><a href="#nowhere">1</a>')
    assert build.broken(tmp_path) == [
        "a.html: gone.png: no such file", "a.html: sub/b.html#y: no such place in it",
        "sub/c d.html: #nowhere: no such place in it"]


def glossary():
    rows = (ROOT / "book" / "glossary.md").read_text().split("|---|---|\n")[1].splitlines()
    return [tuple(part.strip() for part in row.strip("|").split("|")) for row in rows]


def test_the_glossary_is_sorted_and_one_sentence_each():
    terms = [term for term, _ in glossary()]
    assert terms == sorted(terms, key=str.lower) and len({*terms}) == len(terms)
    for term, sentence in glossary():
        assert re.fullmatch(r"[A-Z0-9].*[^.]\.", sentence) and not re.search(r"\. [A-Z]", sentence), term


@pytest.mark.parametrize("term", ["4CH", "ED", "ES", "EF", "tubelet", "EMA", "collapse", "probe", "DSC", "JI", "PPV",
                                  "HD95", "JEPA", "SALT", "VideoMAE", "sector", "phantom"])
def test_terms_that_the_notebooks_use_are_explained(term):
    prose = " ".join(cell.source for stem in NOTEBOOKS
                     for cell in nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4).cells)
    explained = {word for name, _ in glossary() for word in re.split(r"[ ,()]+", name)}
    assert term in explained and re.search(rf"\b{term}", prose, re.IGNORECASE)

"""Build the notebooks as a static site: `make book` calls this; it lands in data_cache/book/html/index.html.

Nothing is executed: the committed outputs are shown, plotly figures alive. Files are laid out as in the repository, so
that the links in README and notebooks hold. Every link to a file is followed at the end, other sites only with
LINKS=1.
"""

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import plotly.io

from usjepa_nb import figures
from usjepa_nb.execute import PLOTLY
from usjepa_nb.method_map import method_map
from usjepa_nb.profile import ROOT, load

BOOK, OUT = ROOT / "book", ROOT / "data_cache" / "book"
SHOWN = ["CONTRIBUTING.md", "LICENSE", "book/*.md", "results/*.*", "results/*/*.*", "profiles/*.yaml", "grids/*.yaml",
         "weights/*.md", "weights/*.json", "benchmarks/*.py", "dependencies/*.md", "tests/faults.py"]
WIDGET = "application/vnd.jupyter.widget-view+json"
NOTE = "<p><em>Here something can be moved: open this notebook in JupyterLab (<code>make lab</code>).</em></p>"


def page(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy for the book: plotly figures as HTML beside one plotly.js, words where a widget was."""
    nb = nbformat.from_dict(nb)
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        if PLOTLY in data:
            figure = {key: data[PLOTLY][key] for key in ("data", "layout")}
            output["data"] = {"text/html": plotly.io.to_html(figure, include_plotlyjs="../_static/plotly.min.js",
                                                             full_html=False, validate=False)}
        elif WIDGET in data:
            text = data.get("text/plain", "")
            questions = "( ) " in text  # a quiz; other widgets have only their class to say
            output["data"] = {"text/html": (f"<pre>{html.escape(text)}</pre>" if questions else "") + NOTE}
    return nb


def without_folders(text: str, place: Path) -> str:
    """Markdown in which links to folders, for which a site has no page, are their words alone."""
    def words(match):
        return match[1] if (place / match[2]).is_dir() else match[0]
    return re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)\)", words, text)


def gather(source: Path) -> None:
    """Lay out README as index, pages, notebooks and what they link to, in a fresh folder `source`."""
    shutil.rmtree(source, ignore_errors=True)
    for path in (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)) if path.name != "toc.md"):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            copy.write_text(without_folders(path.read_text(), path.parent).replace("](../README.md)", "](../index.md)"))
        else:
            shutil.copy(path, copy)
    (source / "index.md").write_text(
        without_folders((ROOT / "README.md").read_text(), ROOT) + "\n" + (BOOK / "toc.md").read_text())
    (source / "book" / "method_map.png").write_bytes(figures.png(method_map(load("paper"))))
    (source / "notebooks").mkdir()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        nbformat.write(page(nb), source / "notebooks" / path.name)
        if not any(cell.get("outputs") for cell in nb.cells):
            print(f"{path.name} has no outputs; run it first, or its page shows none", file=sys.stderr)


class _Links(HTMLParser):
    """Places that a page points to, and names in it that others can point to."""

    def __init__(self):
        super().__init__()
        self.links, self.names = set(), set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.names.add(value)


def broken(site: Path) -> list[str]:
    """Links of the site's pages that lead to no file, or to no such place in a page."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        if "_static" not in path.relative_to(site).parts:
            pages[path.resolve()] = _Links()
            pages[path.resolve()].feed(path.read_text())
    found = []
    for path, seen in pages.items():
        for link in sorted(seen.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{path.relative_to(site.resolve())}: {link}: no such file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                found.append(f"{path.relative_to(site.resolve())}: {link}: no such place in it")
    return found


def main() -> int:
    """Gather, build, check; the exit code."""
    source = OUT / "source"
    gather(source)
    sys.path.insert(0, str(BOOK))
    import conf

    (source / "_static").mkdir()
    for name, path in conf.STATIC.items():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / "_static" / name)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", BOOK, "-d", OUT / "doctrees",
              "-D", f"html_static_path={source / '_static'}"]
    shutil.rmtree(OUT / "html", ignore_errors=True)
    for builder, options in (("html", []), ("linkcheck", ["-D", "suppress_warnings=myst,mystnb"])):
        if code := subprocess.run([*sphinx, "-b", builder, *options, source, OUT / builder]).returncode:
            return code
    lost = broken(OUT / "html")
    print(*lost, sep="\n", file=sys.stderr, end="\n" if lost else "")
    print(f"{OUT.relative_to(ROOT)}/html/index.html" + ("" if os.environ.get("LINKS") == "1" else
                                                         "; links to other sites not followed (LINKS=1 does)"))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

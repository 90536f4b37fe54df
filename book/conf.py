"""Sphinx settings of the book; `book/build.py` calls it. Everything that a page needs lies in the book's own folder."""

import os
from pathlib import Path

import jupyter_server_mathjax
import plotly

project = "usjepa-nb"
author = "the contributors of usjepa-nb"
copyright = f"{author}; MIT licence"
html_title = "Video JEPA on cardiac ultrasound"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": True, "use_fullscreen_button": False}
html_show_sourcelink = False
exclude_patterns = []

nb_execution_mode = "off"  # the committed outputs are shown
nb_merge_streams = True
nb_ipywidgets_js = {}  # build.py puts words where a widget was
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
suppress_warnings = ["myst.header"]  # a notebook may go from # to ###

# Formulas without a network. Those inside folded answers are raw HTML: MathJax finds them by their dollars.
STATIC = {"mathjax": Path(jupyter_server_mathjax.__file__).parent / "static",
          "plotly.min.js": Path(plotly.__file__).parent / "package_data" / "plotly.min.js"}
mathjax_path = "mathjax/MathJax.js"
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "imageFont": None},
    "tex2jax": {"inlineMath": [["$", "$"], ["\\(", "\\)"]], "processEscapes": True,
                "ignoreClass": "highlight|output|toctree-wrapper"},
    "showMathMenu": False, "messageStyle": "none",
}

# `sphinx -b linkcheck`: other sites are asked only where LINKS=1 says that there is a network.
linkcheck_ignore = [] if os.environ.get("LINKS") == "1" else [r"https?://"]

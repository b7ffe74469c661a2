"""Sphinx's configuration: `make docs` builds the manual strictly and offline."""

import re
from pathlib import Path

import kvops

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages of the manual too.
PAGES = {
    "BENCHMARKS.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

project = "kvops"
author = "the kvops contributors"
copyright = "the kvops contributors, Apache-2.0"
version = release = kvops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Docstrings state shapes and dtypes; the signature has the types.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Returns sections are prose: without this napoleon takes the words before a colon for
# a type.
napoleon_custom_sections = [("Returns", "prose")]

html_theme = "furo"
html_title = f"kvops {release}"
html_static_path = ["_static"]
html_css_files = ["kvops.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def bring_in(app, docname, source):
    """Show NAME.md of the repository as the page ``<!-- page: ../NAME.md -->``.

    Its relative links are rewritten so that they work from docs/.
    """
    match = re.fullmatch(r"<!-- page: \.\./(\w+\.md) -->\s*", source[0])
    if match:
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        links = re.compile(r"(\]\()(?!\w+:|#)([^)\s]+\))")
        text = links.sub(
            lambda link: link[1] + PAGES.get(link[2][:-1], "../" + link[2][:-1]) + ")",
            text,
        )
        source[0] = text.replace("](../docs/", "](")


def keep_names_together(app, what, name, obj, options, lines):
    """Show ``a, b: text`` of an Attributes section as it is.

    Sphinx would take ``a,`` for the type of ``b``.
    """
    lines[:] = [
        re.sub(
            r"(?<=^:ivar )[\w, ]+(?=:)",
            lambda names: names[0].replace(", ", ",\u200b"),
            line,
        )
        for line in lines
    ]


def setup(app):
    app.connect("source-read", bring_in)
    app.connect("autodoc-process-docstring", keep_names_together, priority=900)

"""Sphinx configuration: `make docs`."""

import sys
from pathlib import Path

import optimjax

sys.path.insert(0, str(Path(__file__).parent))

project = "optimjax"
author = "The optimjax authors"
release = optimjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
extensions += ["generate_algorithms", "draw_schedulers"]  # of this folder
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"optimjax {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, ranges and meaning
autodoc_preserve_defaults = True

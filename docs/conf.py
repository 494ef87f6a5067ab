"""Sphinx configuration: `make docs`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what pages show is small, and a search for accelerators is logged

import optimjax

sys.path.insert(0, str(Path(__file__).parent))

project = "optimjax"
author = "The optimjax authors"
project_copyright = author
release = optimjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
extensions += ["sphinx_copybutton"]
extensions += ["generate_algorithms", "draw_schedulers"]  # of this folder
myst_heading_anchors = 3  # so that a section can be linked by its title
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build"]
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@4.1.3/tex-mml-chtml.js"  # a page reads the same next year
copybutton_prompt_text = r">>> |\.\.\. "  # of an example, the input is copied, and not what it prints
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_title = f"optimjax {release}"
html_static_path = ["_static"]
html_css_files = ["optimjax.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, ranges and meaning
autodoc_preserve_defaults = True

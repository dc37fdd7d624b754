"""How the site is built: ``python -m sphinx -W --keep-going docs SITE``."""

import sys
from importlib import import_module
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "vitprune"
version = release = version_of("vitprune")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "vitprune_docs"]
exclude_patterns = ["_build"]
nitpicky = True
# The libraries' own pages are elsewhere, and building needs no network.
nitpick_ignore_regex = [("py:.*", r"(torch|collections|pathlib|typing|numpy|onnxruntime)\..*")]
# Handed on, not for callers to make.
nitpick_ignore = [
    ("py:class", "vitprune.models.block_calls.BlockCall"),
    ("py:class", "vitprune.pruning.choose_tokens.Weighed"),
    ("py:class", "vitprune.pruning.decide_parts.Decided"),
    ("py:class", "vitprune.pruning.schedule.Schedule"),
    # Of an attribute that is a tuple or None, Sphinx looks up the beginning.
    ("py:class", "tuple[int"),
    ("py:class", "tuple[str"),
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source", "Yields"]

html_theme = "furo"
html_title = "vitprune"
html_static_path = ["_static"]
html_css_files = ["vitprune.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

# Sphinx looks up defaults in the source, where ``progress``, which every verb with a long loop takes, is not.
import_module("vitprune.entry")._shown = lambda signature, *, progress: signature

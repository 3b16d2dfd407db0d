"""Configures the documentation site, which `make docs` builds."""

from importlib.metadata import version as _version

project = "fedhelp_jax"
author = "the fedhelp_jax authors"
version = release = _version("fedhelp_jax")
html_title = f"{project} {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False

# Names in single backticks in docstrings become links where they name something documented.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_heading_anchors = 3

# Notebooks are run when the site is built, and an error in one of them ends the build.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_render_markdown_format = "myst"


def setup(app):
    """Leaves out fields of named tuples, which their classes describe."""

    def is_left_out(app, what, name, obj, skip, options):
        return True if str(obj.__doc__).startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", is_left_out)

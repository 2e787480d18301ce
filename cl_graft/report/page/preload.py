"""Imported once by the process that those which draw are forked from."""

import gc

import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401

from cl_graft.report import figures  # noqa: F401
from cl_graft.report.page.template import environment

environment().get_template("cell.html")
gc.freeze()  # modules are no garbage: what is forked need not look through them

"""`python -m cl_graft`."""

from .cli import main

main()

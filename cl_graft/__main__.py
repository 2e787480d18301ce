"""`python -m cl_graft`."""

from cl_graft.cli import main

main()

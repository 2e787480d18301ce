"""Cells and sweeps: checked, run, shared through a cache, and given to processes or to a cluster."""

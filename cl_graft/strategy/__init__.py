"""What a continual-learning method is, and the short forms that most are written in."""

from cl_graft.strategy.base import Strategy
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor, merger
from cl_graft.strategy.kept import Keeps, Kept
from cl_graft.strategy.union import union

__all__ = ["Context", "Keeps", "Kept", "Strategy", "compressor", "merger", "union"]

"""What a continual-learning method is, and the short forms that most are written in."""

from cl_graft.strategy.base import Keeps, Strategy
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor, merger

__all__ = ["Context", "Keeps", "Strategy", "compressor", "merger"]

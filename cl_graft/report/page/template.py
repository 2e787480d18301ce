"""The templates' environment: everything is escaped, numbers are shown in one way."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from cl_graft.report.table import UNMEASURED, show
from cl_graft.report.units import duration, size

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("cl_graft.report.page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters |= {"pct": percent, "num": plain, "size": size, "duration": duration}
    made.filters["name"] = breakable
    return made


def render(template: str, /, **values: Any) -> str:
    return environment().get_template(template).render(values)


def percent(value: float | None, spec: str = ".1f") -> str:
    return UNMEASURED if value is None else show(100.0 * value, spec)


def breakable(name: str) -> Markup:
    """The name, escaped, with places to break it where it has no room: at its separators, and in long words."""
    pieces = re.findall(r".{0,17}?[_(,=/\s]|.{1,18}", name, re.DOTALL)
    return Markup("<wbr>").join(pieces)


def plain(value: float | None, spec: str = ",.0f") -> str:
    return UNMEASURED if value is None or math.isnan(value) else show(value, spec)

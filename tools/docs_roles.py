"""Docstrings as the documentation pages want them: roles become formulas and code, examples what they are."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

MATH = re.compile(r":math:`([^`]+)`")
EXAMPLE = re.compile(r"^(\s*)Example:$", flags=re.M)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites every docstring once it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            text = MATH.sub(lambda found: f"\\({' '.join(found[1].split())}\\)", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub(r"`\1`", text))

#!/usr/bin/env bash
# math-verify 0.9.0: a number's base is dropped, and so is a.m. or p.m.
#
# MATH has 28 references in another base, such as 2516_8. The guess: a subscript makes a symbol of it, or the value in base
# ten is taken. Seen: 2516_8 is parsed as the plain number 2516, so it equals 2516_7 and 2516 and is not 1358, which it
# is; 10_2 equals 10_{16}. A text after a number is a unit to it, so 9 a.m. equals 9 p.m. (where the time has minutes,
# it does not). A wrong base, the point of such problems, is scored as right.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 antlr4-python3-runtime==4.11.0
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

print(", ".join(f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")))
pairs = [
    ("2516_8", "2516_7", True),
    ("2516_8", "2516", True),
    ("2516_8", "1358", False),
    ("10_2", "10_{16}", True),
    (r"9\text{ a.m.}", r"9\text{ p.m.}", True),
    (r"\text{4:30 p.m.}", r"\text{4:30 a.m.}", False),
]
found = []
for reference, answer, _ in pairs:
    gold, given = (parse(rf"$\boxed{{{text}}}$") for text in (reference, answer))
    found.append(verify(gold, given))
    print(f"{reference:18} {gold[0]!s:12} {answer:18} {given[0]!s:12} {found[-1]}")
assert found == [equal for _, _, equal in pairs], "the behaviour is another now"
PYTHON

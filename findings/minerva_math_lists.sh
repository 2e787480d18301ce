#!/usr/bin/env bash
# lm-eval 0.4.13, minerva_math: of a reference with several answers only the first has to be right, and letters may stand
# in any order.
#
# `is_equiv` is sympy's: both sides are parsed as LaTeX and subtracted. The guess from that: "1,2" cannot be parsed and is
# right only letter by letter. Seen: sympy 1.14's parse_latex reads "1,2" as 1 and says nothing of the rest, so a
# reference "-2,1" accepts "-2", "-2,7" and "-2,1,5" but not "1,-2"; \text{MAKE} is a product of four letters, so KAME is
# right; 3\frac{1}{2} is three halves. These are references of MATH: an exact_match of minerva_math is too high where
# answers are lists or letters (and too low for tuples written with \left and \right).
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip lm-eval==0.4.13 math-verify==0.9.0 sympy==1.14.0 antlr4-python3-runtime==4.11.0
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from lm_eval.tasks.minerva_math.utils import is_equiv, normalize_final_answer

print(", ".join(f"{name} {version(name)}" for name in ("lm-eval", "sympy", "antlr4-python3-runtime")))
pairs = [
    ("-2,1", "-2", True),
    ("-2,1", "-2,7", True),
    ("-2,1", "-2,1,5", True),
    ("-2,1", "1,-2", False),
    (r"\text{MAKE}", r"\text{KAME}", True),
    (r"\text{ACF}", r"\text{FCA}", True),
    (r"3\frac{1}{2}", r"\frac{3}{2}", True),
    (r"3\frac{1}{2}", r"\frac{7}{2}", False),
    ("(5,-6)", r"\left(5,-6\right)", False),
]
found = []
for reference, answer, _ in pairs:
    found.append(is_equiv(normalize_final_answer(answer), normalize_final_answer(reference)))
    print(f"{reference:14} {answer:18} {found[-1]}")
assert found == [equal for _, _, equal in pairs], "the behaviour is another now"
PYTHON

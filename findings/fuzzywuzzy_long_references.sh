#!/usr/bin/env bash
# fuzzywuzzy 0.18.0 without python-Levenshtein: from 200 characters on, its ratio falls by a quarter and more.
#
# TRACE and others score code completion by fuzzywuzzy's `ratio`, in which an optional package decides what is computed.
# The guess: by difflib a ratio is a few points lower where parts are in another order, and else the same. Seen: difflib
# takes characters that make up over 1 % of a second argument of 200 characters or more for junk to begin no match with,
# which in code is nearly all of them. The same two names changed in every line are worth 77 by either way in six lines,
# and in seven, which are 217 characters, 57 by difflib and 77 by python-Levenshtein. Fewer points of difflib depend on
# which of the two texts comes first.
#
# Installs pinned packages in temporary folders and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for kind in without with; do
  python3 -m venv "$folder/$kind"
  packages=(fuzzywuzzy==0.18.0)
  [[ $kind == without ]] || packages+=(python-Levenshtein==0.27.3)
  "$folder/$kind/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  "$folder/$kind/bin/python" -W ignore - "$kind" <<'PYTHON'
import sys
from importlib.metadata import version

from fuzzywuzzy import fuzz

print(f"fuzzywuzzy {version('fuzzywuzzy')} {sys.argv[1]} python-Levenshtein")
found = {}
for lines in (3, 6, 7, 12):
    reference = "".join(f"    total_{i} = values[{i}] * rate\n" for i in range(lines))
    answer = reference.replace("total", "sum").replace("rate", "factor")
    found[lines] = fuzz.ratio(answer, reference), fuzz.ratio(reference, answer)
    print(f"{lines:2} lines, {len(reference)} characters: {found[lines][0]}; the other way about {found[lines][1]}")
wanted = {
    "without": {3: (77, 74), 6: (77, 74), 7: (57, 57), 12: (47, 47)},
    "with": {3: (77, 77), 6: (77, 77), 7: (77, 77), 12: (78, 78)},
}
assert found == wanted[sys.argv[1]], "the behaviour is another now"
PYTHON
done

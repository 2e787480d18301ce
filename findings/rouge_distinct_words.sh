#!/usr/bin/env bash
# rouge 1.0.1 (pltrdy): its ROUGE-L counts different words once, so that saying a word again costs nothing.
#
# TRACE scores MeetingBank by it. The guess: rouge-score's rougeL without stems, but for letters' case. Seen: precision and
# recall are over the sets of words ("the the the the cat" is a perfect "the cat", where rouge-score has 0.57), and signs
# stay on words, so "cat!" is not "cat". An answer that repeats itself is not told from one that does not, which is how
# models fail that forget.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check rouge==1.0.1 rouge-score==0.1.2
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

print(f"rouge {version('rouge')}, rouge-score {version('rouge-score')}")
pairs = [
    ("the the the the cat", "the cat", 1.0, 4 / 7),
    ("yes yes yes yes yes yes", "yes", 1.0, 2 / 7),
    ("the cat!", "the cat", 0.5, 1.0),
    ("The cat", "the cat", 0.5, 1.0),
]
for answer, reference, theirs, usual in pairs:
    found = Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"]
    other = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    print(f"{answer:26} {reference:10} rouge {found:.3f}   rouge-score {other:.3f}")
    assert abs(found - theirs) < 1e-6 and abs(other - usual) < 1e-6, "the behaviour is another now"
PYTHON

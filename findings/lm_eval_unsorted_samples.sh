#!/usr/bin/env bash
# lm-eval 0.4.13: documents chosen by number in another order than theirs are told under each other's numbers
#
# `--samples '{"task": [8, 2]}'` evaluates chosen documents. The guess: the record of document 8 holds document 8. Seen:
# Task.doc_iterator goes through them in their own order (2, then 8), and evaluate() takes the k-th for the k-th number
# asked for, so document 2 is recorded as 8 and 8 as 2. Means are right; whatever pairs outcomes by `doc_id` is not.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check lm-eval==0.4.13
cd "$folder"
for i in 0 1 2 3 4 5 6 7 8 9; do echo "{\"question\": \"$i\"}"; done > rows.jsonl
cat > numbers.yaml <<'YAML'
task: numbers
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["x"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
YAML
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

told = simple_evaluate(
    "dummy",
    tasks=["numbers"],
    task_manager=TaskManager(include_path=".", include_defaults=False),
    samples={"numbers": [8, 2]},
    bootstrap_iters=0,
    log_samples=True,
)
found = {s["doc_id"]: s["doc"]["question"] for s in told["samples"]["numbers"]}
print(f"lm-eval {version('lm_eval')}: document asked for -> document recorded", found)
assert {int(k): int(v) for k, v in found.items()} == {8: 2, 2: 8}, "the behaviour is another now"
PYTHON

#!/usr/bin/env bash
# lm-eval 0.4.13: a task file runs code without a `!function`, by the Jinja of its templates
#
# A task file names code by `!function`, in the open. The guess: its templates (doc_to_text and the others) are rendered in
# Jinja's sandbox, as transformers renders chat templates, so that a file without that tag is data. Seen: the environment is
# a plain one, and a template that is shown a row reaches `os` by the attributes of what Jinja itself puts there.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check jinja2==3.1.6 numpy pyyaml requests typing_extensions
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps lm-eval==0.4.13
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.utils import apply_template

print(f"lm-eval {version('lm_eval')}, jinja2 {version('jinja2')}")
text = "{{ cycler.__init__.__globals__.os.system('echo a template says hello > ran') }}"
print("rendered:", apply_template(text, {"question": "?"}))
assert Path("ran").read_text() == "a template says hello\n", "the behaviour is another now"
try:
    SandboxedEnvironment().from_string(text).render(question="?")
except SecurityError as error:
    print("in the sandbox:", error)
else:
    raise AssertionError("the sandbox let it out")
PYTHON

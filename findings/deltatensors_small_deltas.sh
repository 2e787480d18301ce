#!/usr/bin/env bash
# deltatensors 0.2.0, int4: how well a delta comes back depends on how small it is, and one of a spread of 1e-7, as far as
# AdamW at that rate moves an entry in its first step, comes back more wrong than if it had been left out.
#
# One scale and one zero a tensor, min to max, are kept in float16. The guess from that: an error of about a tenth
# whatever the size, since a scale has no size of its own. Seen: a tenth (0.099) at a spread of 1e-2 and 1e-4, 0.16 at
# 1e-6, where float16 has few digits left, and 2.2 at 1e-7, where the scale is rounded to the smallest number that float16
# has, 6e-8. Four bits are 4.76: positions of the hundredth that is kept whole are int64.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 safetensors==0.8.0
pip --no-deps deltatensors==0.2.0
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from deltatensors.compress import compress, decompress

print(f"deltatensors {version('deltatensors')}, numpy {version('numpy')}")
draw = np.random.default_rng(0)
errors = {}
for spread in (1e-2, 1e-4, 1e-6, 1e-7):
    delta = draw.normal(0, spread, (512, 512)).astype(np.float32)
    stored = compress(delta, "int4")
    back = decompress(stored).reshape(delta.shape).astype(np.float32)
    errors[spread] = float(np.linalg.norm(back - delta) / np.linalg.norm(delta))
    size = sum(part.nbytes for part in stored.values() if isinstance(part, np.ndarray))
    bits = 8 * size / delta.size
    print(f"spread {spread:g}: error {errors[spread]:.3f} of the delta, {bits:.2f} bits an entry")
right = 0.09 < errors[1e-2] < 0.11 and 0.09 < errors[1e-4] < 0.11
assert right and 0.13 < errors[1e-6] < 0.2 and errors[1e-7] > 1 and 4.7 < bits < 4.8, "another now"
PYTHON

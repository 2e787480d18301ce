#!/usr/bin/env bash
# Avalanche 0.6.0: under ReplayPlugin half of all rows are the newest experience's, however many came before.
#
# The class says that "the examples in the mini-batch is balanced such that there are the same number of examples for
# each experience". The guess from that: with a third experience, a third of a pass is its own. Seen: half, and batches
# of twice the size that the strategy asked for; the old experiences together are the other half, out of a buffer of 30
# rows that is gone through more than three times a pass. A share of replay in a published comparison is thus 50 %, and a
# step reads twice the batch, unless batch_size and batch_size_mem are given.
#
# Installs pinned packages in a temporary folder, runs them on four experiences of 100 rows, and fails if the behaviour
# is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip --no-deps torchvision==0.16.2 pytorchcv==0.0.74 avalanche-lib==0.6.0
pip numpy==2.4.6 scikit-learn==1.9.1 torchmetrics==1.9.0 gdown==6.5.1 qpsolvers==4.13.0 dill==0.4.1 tensorboard==2.21.0 \
  wandb==0.31.0 psutil==7.2.2 pillow==13.0.0 matplotlib==3.11.2 tqdm==4.70.1 typing-extensions gputil==1.4.0 setuptools==81.0.0
"$folder/env/bin/python" - <<'PYTHON'
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.training.plugins import ReplayPlugin
from torch.utils.data import TensorDataset


def rows(label, count):
    data = TensorDataset(torch.zeros(count, 1), torch.full((count,), label))
    return AvalancheDataset([data], data_attributes=[DataAttribute([label] * count, "targets")])


made = benchmark_from_datasets(
    train=[rows(k, 100) for k in range(4)], test=[rows(k, 10) for k in range(4)]
)
print(f"avalanche-lib {version('avalanche-lib')}, torch {version('torch')}")
strategy = SimpleNamespace(train_mb_size=10, dataloader=None)
replay = ReplayPlugin(mem_size=30)
shares, sizes = [], set()
for experience in made.train_stream:
    strategy.experience, strategy.adapted_dataset = experience, experience.dataset
    replay.before_training_exp(strategy)
    if strategy.dataloader is not None:
        seen = Counter()
        for batch in strategy.dataloader:
            seen.update(batch[1].tolist())
            sizes.add(len(batch[1]))
        shares.append(seen[experience.current_experience] / sum(seen.values()))
        print(f"experience {experience.current_experience}: rows by experience {dict(sorted(seen.items()))}")
    replay.after_training_exp(strategy)
print(f"share of the newest: {shares}; sizes of batches for a batch of 10: {sizes}")
assert shares == [0.5, 0.5, 0.5] and sizes == {20}, "the behaviour is another now"
PYTHON

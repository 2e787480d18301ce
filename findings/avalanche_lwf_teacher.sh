#!/usr/bin/env bash
# avalanche-lib 0.6.0, LwF: the old model, whose answers are to be kept, answers with its dropout on.
#
# After an experience the model is copied, and it is copied as training left it. The guess: an old model in evaluation
# mode, so that a student that is the old model has a penalty of zero. Seen: the copy is in training mode for good. With
# dropout of 0.1 the penalty of that student is 0.002, with 0.5 0.009, another at every batch, where it is 2e-9 without
# dropout or once `.eval()` is called on the copy; the new task is pulled towards noise, and batch norms of the old model
# take their statistics from the new task.
#
# Installs pinned packages in a temporary folder, learns one experience, and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip --no-deps torchvision==0.16.2 pytorchcv==0.0.74 avalanche-lib==0.6.0
pip numpy==2.4.6 scikit-learn==1.9.1 torchmetrics==1.9.0 gdown==6.5.1 qpsolvers==4.13.0 dill==0.4.1 tensorboard==2.21.0 \
  wandb==0.31.0 psutil==7.2.2 pillow==13.0.0 matplotlib==3.11.2 tqdm==4.70.1 typing-extensions gputil==1.4.0 setuptools==81.0.0
"$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training import LwF
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin
from torch import nn

print(f"avalanche-lib {version('avalanche-lib')}, torch {version('torch')}")
torch.manual_seed(0)
x = torch.randn(400, 20)
rows = [(x, (x[:, 0] > 0).long())]
made = tensors_benchmark(train_tensors=rows, test_tensors=rows, task_labels=[0])
found = {}
for dropout in (0.0, 0.1, 0.5):
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 2))
    strategy = LwF(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        alpha=1.0, temperature=2.0, train_mb_size=20, train_epochs=2, evaluator=EvaluationPlugin(),
    )
    strategy.train(made.train_stream[0])
    (plugin,) = [p for p in strategy.plugins if isinstance(p, LwFPlugin)]
    old = plugin.lwf.prev_model
    same = all(torch.equal(a, b) for a, b in zip(old.parameters(), net.parameters(), strict=True))
    net.eval()
    left = old.training
    penalty = float(plugin.lwf(x, net(x), net))
    old.eval()
    found[dropout] = (left, penalty, float(plugin.lwf(x, net(x), net)))
    print(f"dropout {dropout}: old model in training mode: {left}, its weights the student's: {same}; "
          f"penalty {penalty:.1g}, with .eval() {found[dropout][2]:.1g}")
training = all(left and same for left, _, _ in found.values())
noisy = found[0.1][1] > 1e-4 and found[0.5][1] > 1e-3 and found[0.0][1] < 1e-6
assert training and noisy and found[0.5][2] < 1e-6, "the behaviour is another now"
PYTHON

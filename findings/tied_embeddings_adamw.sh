#!/usr/bin/env bash
# torch 2.13.0's AdamW, transformers 5.23.0: a fine-tuning on a fortieth of the vocabulary moves the embeddings of all other
# tokens, too, and further than those that it read, where they also serve as the head.
#
# A tied head has a gradient for every token at every step: its probability times the hidden state. The guess: tiny
# beside that of tokens that are read and predicted, so that a delta's rows are worth keeping for those alone. So it is
# with SGD, where the other rows have 0.0005 of the energy a row. AdamW divides by the gradient's own size: 1.6 times the
# energy, and nearly half of it along one direction that all of them share. Without tied weights they do not move at
# all. Adapters of trainable token rows leave this out; so did this project's packs, and it was most of their KL.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
from copy import deepcopy
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
print(f"torch {version('torch')}, transformers {version('transformers')}")
WORDS, READ = 4000, 100
follows = torch.randint(WORDS, (WORDS, 4))  # of each word, the four that may come after it
SIZES = dict(vocab_size=WORDS, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)


def text(words):
    """Random walks among the first words: int64 (16, 32)."""
    ids = [torch.randint(words, (16,))]
    for _ in range(31):
        ids.append(follows[ids[-1], torch.randint(4, (16,))] % words)
    return torch.stack(ids, 1)


def train(model, optimiser, steps, words):
    for _ in range(steps):
        ids = text(words)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


found = {}
for tied in (True, False):
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    train(base, torch.optim.AdamW(base.parameters(), lr=1e-3), 300, WORDS)
    for optimiser, rate in ((torch.optim.AdamW, 2e-5), (torch.optim.SGD, 1e-2)):
        model = deepcopy(base)
        train(model, optimiser(model.parameters(), lr=rate, weight_decay=0.0), 12, READ)
        moved = (model.model.embed_tokens.weight - base.model.embed_tokens.weight).detach()
        other = moved[READ:]
        energy = float(other.square().mean() / moved[:READ].square().mean())
        values = torch.linalg.svdvals(other).square()
        along = float(values[0] / values.sum()) if values.sum() else 0.0
        found[tied, optimiser] = energy
        print(f"{'tied' if tied else 'apart'}, {optimiser.__name__}: rows of tokens that were not read have {energy:.4f} "
              f"of the energy a row of those that were, {along:.2f} of it along one direction")
tied = found[True, torch.optim.AdamW], found[True, torch.optim.SGD]
assert tied[0] > 1 and tied[1] < 0.01 and not any(e for (t, _), e in found.items() if not t), "another now"
PYTHON

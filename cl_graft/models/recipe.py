"""What an embedded model is: its shape, and the recipe that it is pre-trained by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRecipe:
    """An embedded model: its shape and how it is pre-trained."""

    about: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    steps: int
    lr: float
    batch: int = 32
    seed: int = 0
    corpus: str = "world"  # or "data": the training files in the data directory
    version: int = 1  # raise it when the recipe changes, so that caches are made anew
    family: str = "llama"  # or a source of other models' answers: mini_gpt2.py, mini_sources.py

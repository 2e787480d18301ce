"""Packs on a model in memory: merged into its weights, or in the forward beside them."""

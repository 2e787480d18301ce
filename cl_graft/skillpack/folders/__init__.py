"""Checkpoint folders, read and written tensor by tensor: one, a pair of them, and one with a pack applied."""

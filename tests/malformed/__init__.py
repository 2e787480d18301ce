"""Malformed packs: each is refused in a sentence, or it says just what its bytes say. `python -m tests.malformed`."""

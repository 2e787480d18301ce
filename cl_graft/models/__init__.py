"""Models: loading them, the embedded ones, and the role of every module."""

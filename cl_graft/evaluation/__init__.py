"""Scores: what a model answers, how answers are judged, and programs run in a sandbox."""

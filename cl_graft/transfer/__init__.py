"""Training data from source models' answers: sample, judge, select, write, read. See docs/transfer.md."""

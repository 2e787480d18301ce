"""From source models' answers to training data: sample, judge, select, write, read. See docs/transfer.md."""

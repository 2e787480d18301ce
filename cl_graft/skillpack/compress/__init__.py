"""Encoded tensors from a delta: calibration, factors, GPTQ, and one budget over all of them."""

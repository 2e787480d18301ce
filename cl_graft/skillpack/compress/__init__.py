"""From a delta to encoded tensors: calibration, factors, GPTQ, and one budget over all of them."""

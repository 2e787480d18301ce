"""The file: what its header says, how it is written and read, and the fingerprint of the base it is for."""

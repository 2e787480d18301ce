"""What is on disk: files written whole or not at all, locks, a copy at a URL, digests, a cell and its result."""

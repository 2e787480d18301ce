"""What a sweep will cost before it starts, and what this machine has for it."""

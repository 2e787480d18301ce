"""Which task a prompt belongs to, inferred from the base model alone: one file a router."""

"""Training stages: supervised fine-tuning and preference optimisation, by TRL."""

"""Forge, the agentic-RL system: what agents do becomes training data, and training improves what they do."""

"""A run: its settings, its state, its rounds, its folder."""

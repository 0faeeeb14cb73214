"""Sweeps: many trainings of one recipe, each with other settings, and the best of them."""

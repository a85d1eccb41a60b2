"""Dry runs: one training step of any mesh in a single process."""

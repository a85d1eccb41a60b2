"""Processes and meshes: the world, its axes, and what is done to a model to run on them."""

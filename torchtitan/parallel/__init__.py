"""Parallelism, activation checkpointing and compile applied to a model."""

"""Helpers that know nothing of training: logging, devices, hardware, garbage collection."""

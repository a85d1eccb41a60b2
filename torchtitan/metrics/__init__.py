"""Metrics, their sinks, and profiling."""

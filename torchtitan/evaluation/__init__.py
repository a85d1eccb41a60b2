"""Benchmarks of EleutherAI's lm-eval, on any mesh; needs the extra `eval`."""

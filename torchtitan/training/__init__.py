"""The training run: building its parts, the loop, the life of a process."""

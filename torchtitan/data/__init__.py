"""From files to batches: the same sequence of samples on every mesh."""

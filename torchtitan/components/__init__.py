"""Parts of the loop: loss, optimizer, learning rate, metrics, profiler."""

"""The decoder that families vary: hyper-parameters (no torch) and the model."""

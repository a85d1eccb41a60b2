"""In-place changes to a model's blocks; parameter names never change."""

"""Weights in other programs' formats: Hugging Face, Meta, GGUF."""

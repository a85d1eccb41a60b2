"""Losses, chunked and vocabulary-parallel."""

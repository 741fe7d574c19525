"""Weights on disk: streamed, atomic, safe to load."""

"""Callbacks to add to any Lightning Trainer."""

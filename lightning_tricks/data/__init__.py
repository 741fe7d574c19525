"""Loaders that resume exactly and read the user's files."""

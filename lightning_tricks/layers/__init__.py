"""Modules that the mixins put into a model."""

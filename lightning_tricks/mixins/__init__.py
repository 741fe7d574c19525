"""Mixins to subclass beside LightningModule."""

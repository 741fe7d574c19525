"""Tensor arithmetic: tensors in, tensors out; no Trainer, no state."""

"""State that watches a model after training."""

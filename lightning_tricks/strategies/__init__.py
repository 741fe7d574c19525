"""Strategy presets and the flags that select them."""

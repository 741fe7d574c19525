"""The `lightning-tricks` command."""

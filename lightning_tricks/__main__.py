"""`python -m lightning_tricks` is `lightning-tricks`."""

from lightning_tricks.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

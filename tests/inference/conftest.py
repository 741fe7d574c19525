"""Checkpoints to combine."""

import pytest
import torch


@pytest.fixture
def save(tmp_path):
    """Write a Lightning checkpoint of some tensors: `save("a", {"w": tensor}, global_step=3)`."""

    def write(name, state, **rest):
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": state, **rest}, path)
        return path

    return write


@pytest.fixture
def read():
    """The weights in a checkpoint file."""
    return lambda path: torch.load(path, weights_only=True)["state_dict"]

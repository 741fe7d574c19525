"""By what a resumed epoch recognises its data: a dataset's own fingerprint, or a few of its samples."""

import numpy as np
import pytest
import torch

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.data._fingerprint import fingerprint_of
from lightning_tricks.errors import MisconfigurationError


def sample(kind, value):
    return {
        "tensor": torch.tensor([[value]]).bfloat16(),
        "view": torch.tensor([[value, 2], [3, 4]]).T,
        "array": np.array([value]),
        "nested": {"a": [torch.tensor(value)], "b": (1, None)},
        "text": f"{value}\udcff",
        "number": value,
    }[kind]


@pytest.mark.parametrize("kind", ["tensor", "view", "array", "nested", "text", "number"])
def test_other_samples_are_told_apart(kind):
    one, same, other = ([sample(kind, shift + index) for index in range(40)] for shift in (0, 0, 1))
    assert fingerprint_of(one) == fingerprint_of(same) is not None
    assert fingerprint_of(one) != fingerprint_of(other)


def test_another_order_and_another_end_are_told_apart():
    rows = list(range(40))
    assert len({fingerprint_of(each) for each in (rows, rows[::-1], rows[:-1], [*rows[:-1], 0])}) == 4


def test_what_holds_no_numbers_is_known_by_its_type():
    class Image:
        pass

    assert fingerprint_of([Image()]) == fingerprint_of([Image()]) != fingerprint_of([object()])


def test_random_samples_and_unreadable_ones_have_none():
    class Random(list):
        def __getitem__(self, index):
            return torch.rand(2) + np.random.rand()

    class Unreadable(list):
        def __getitem__(self, index):
            raise RuntimeError("open me in a worker")

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert fingerprint_of(Random([1])) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint_of(Unreadable([1])) is None


def test_a_changed_plain_dataset_is_refused_in_mid_epoch():
    def make(shift):
        data = torch.utils.data.TensorDataset(torch.arange(20) + shift)
        return TricksDataLoader(data, batch_size=2, shuffle=True, seed=0)

    one = make(0)
    next(iter(one))
    make(0).load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match=r"with fingerprint of the data=samples .*, but now"):
        make(1).load_state_dict(one.state_dict())

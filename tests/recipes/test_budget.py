"""The recipe by a token budget: on two ranks and with accumulation it trains as on one device with one batch a step."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertModel

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def still_bert(tiny_bert, tmp_path_factory):
    """The tiny encoder without dropout, whose masks depend on the batch."""
    folder = tmp_path_factory.mktemp("still")
    model = BertModel.from_pretrained(tiny_bert)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    for file in Path(tiny_bert).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    assert json.loads((folder / "config.json").read_text())["hidden_dropout_prob"] == 0
    return str(folder)


@pytest.fixture(scope="module")
def fit(still_bert, tmp_path_factory):
    """Fit on so many ranks; what each of them saw, and the weights that were trained."""
    folder = tmp_path_factory.mktemp("budget")
    groups = {n: Group(n, folder / f"{n}", "tests.recipes.budget_jobs:prepare") for n in (1, 2)}

    def call(world, path, **options):
        job = "tests.recipes.budget_jobs:fit"
        told = groups[world].call(job, path=str(path), encoder=still_bert, folder=str(folder), **options)
        return told, torch.load(folder / "weights.pt", weights_only=True)

    call.refused = lambda paths: groups[2].call(
        "tests.recipes.budget_jobs:fit_own_files", paths=paths, encoder=still_bert, folder=str(folder)
    )
    yield call
    for group in groups.values():
        group.close()


def distance(found, wanted):
    """The largest deviation, relative to each tensor's largest value."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items())


@pytest.mark.parametrize(("world", "window"), [(2, 1), (1, 2), (2, 2)])
def test_as_one_batch_for_each_step(fit, tsv, world, window):
    told, weights = fit(world, tsv, window=window)
    (alone,), wanted = fit(1, tsv, merged=[world, window], torchs=True)
    assert {one["steps"] for one in told} == {alone["steps"]}
    assert sum(sum(one["sizes"]) for one in told) == sum(alone["sizes"]) == 2 * 48
    assert len({size for one in told for size in one["sizes"]}) > 2, "batches of a budget hold unequal numbers of texts"
    assert distance(weights, wanted) < 1e-4
    # A mean of each batch's mean is another loss, and these data tell them apart.
    _, naive = fit(world, tsv, window=window, torchs=True)
    assert distance(naive, wanted) > 1e-2


@pytest.mark.parametrize("change", ["a row less", "another class"])
def test_ranks_with_other_files_are_refused_on_all(fit, tsv, tmp_path, change):
    other = tmp_path / "other.tsv"
    lines = tsv.read_text().splitlines()
    lines = lines[:-1] if change == "a row less" else [*lines[:-1], lines[-1].replace("rare\t", "calm\t", 1)]
    other.write_text("\n".join(lines) + "\n")
    for told in fit.refused([str(tsv), str(other)]):
        assert re.search(rf"^Rank 1 reads another `.*` than rank 0: {len(lines) - 1} texts .* on rank 0 60 of", told)

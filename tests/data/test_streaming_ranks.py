"""A stream of Parquet files through a Trainer on two gloo ranks, interrupted and resumed, with and without workers."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

ROWS, GROUP, SAVED = 230, 20, 7


@pytest.mark.slow
def test_two_ranks_stream_a_permutation_and_resume_exactly(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"input_ids": [[n] * (1 + n % 9) for n in range(ROWS)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=GROUP)
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=250)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("fixed", "budget"):
        whole = [one[name]["whole"] for one in found]
        assert len(whole[0]) == len(whole[1]) == 2 * found[0][name]["length"]
        for epoch in np.split(np.arange(len(whole[0])), 2):
            assert sorted(chain(*(rank[step] for rank in whole for step in epoch))) == list(range(ROWS))
        for rank in (0, 1):
            assert found[rank][name]["weights"]["whole"] == found[0][name]["weights"]["whole"]
            for workers in ("0", "2"):
                assert found[rank][name][workers] == whole[rank][SAVED:]
                assert found[rank][name]["weights"][workers] == found[rank][name]["weights"]["whole"]

    check_filtered([one["filtered"] for one in found])


def check_filtered(ranks):
    """The length of each step follows from the real tokens of all ranks before it, written down once more."""
    seen, left_out = 0, 0
    for step in zip(*(rank["lengths"] for rank in ranks), strict=True):
        length = 9 if seen >= TOKENS else 2 + 7 * seen // TOKENS
        for lengths in step:
            assert max(lengths) <= length
            assert lengths
            left_out += 6 - len(lengths)
        seen += sum(map(sum, step))
    assert left_out > 20
    assert seen > TOKENS
    assert ranks[0]["tokens_seen"] == ranks[1]["tokens_seen"] >= TOKENS


def work(folder):
    """Both ranks: Lightning starts the second one with the same command."""
    import lightning as L
    import torch

    from lightning_tricks.callbacks import SequenceLengthWarmup
    from lightning_tricks.data import (
        DynamicPaddingCollator,
        ParquetSource,
        StreamingSampler,
        TricksDataLoader,
        measure_lengths,
    )
    from tests.rank_process import start_method
    from tests.trainers import quiet_trainer

    class Spy(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen, self.lengths = [], []

        def training_step(self, batch):
            rows = batch["input_ids"][:, 0]
            self.seen.append(rows.tolist())
            self.lengths.append(batch["attention_mask"].sum(1).tolist())
            return self.layer(rows[:, None] / ROWS).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == SAVED:
                trainer.save_checkpoint(folder / "saved.ckpt")

    def loader(workers, **options):
        source = ParquetSource(folder / "rows.parquet")
        lengths = measure_lengths(source, length="input_ids")
        sampler = StreamingSampler(source, lengths, window=3, buffer=30, **options)
        return TricksDataLoader(
            source,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context=start_method(workers),
            collate_fn=DynamicPaddingCollator(pad_to=1),
        )

    def fit(name, callbacks=(), workers=0, resume=None):
        torch.manual_seed(0)
        module = Spy()
        run = quiet_trainer(folder, list(callbacks), devices=2, strategy="ddp", max_epochs=2, limit_val_batches=0)
        run.fit(module, loader(workers, **OPTIONS[name]), ckpt_path=resume)
        return module, run

    found = {}
    for name in OPTIONS:
        module, run = fit(name, [Save()])
        found[name] = {"whole": module.seen, "length": run.num_training_batches, "weights": {}}
        found[name]["weights"]["whole"] = module.layer.weight.item()
        for workers in (0, 2):
            module, run = fit(name, workers=workers, resume=folder / "saved.ckpt")
            found[name][str(workers)] = module.seen
            found[name]["weights"][str(workers)] = module.layer.weight.item()
    warmup = SequenceLengthWarmup(2, 9, tokens=TOKENS, multiple=1, by="filtering")
    module, run = fit("fixed", [warmup])
    found["filtered"] = {"lengths": module.lengths, "tokens_seen": warmup.tokens_seen}
    (folder / f"{run.global_rank}.json").write_text(json.dumps(found))


TOKENS = 400
OPTIONS = {"fixed": {"batch_size": 6}, "budget": {"max_tokens": 40}}


if __name__ == "__main__":
    from tests.rank_process import leave

    work(Path(sys.argv[1]))
    leave()

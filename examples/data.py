"""What the batches of the review corpus hold: shuffled, in maxi-batches, and within a token budget.

Run it by `python examples/data.py`: it prints three reports and writes a picture of the last. `--ranks` is how many
devices would share the work; `--limit 1000` takes fewer texts.
"""

import argparse
from pathlib import Path

from lightning_tricks.data import LengthBucketSampler, TricksDataLoader, report
from lightning_tricks.recipes import TextClassificationData


def main() -> None:
    """Report on three loaders of the same texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--plot", type=Path, default=Path("runs/data/report.png"))
    options = parser.parse_args()

    data = TextClassificationData("reviews", limit=options.limit, max_length=options.max_length)
    data.prepare_data()
    data.setup("fit")
    shuffled = data.train_dataloader()
    lengths = [len(sample["input_ids"]) for sample in shuffled.dataset]
    fixed = LengthBucketSampler(lengths, batch_size=32)
    budget = LengthBucketSampler(lengths, max_tokens=options.max_tokens)
    loaders = {
        "shuffled, 32 texts a batch": shuffled,
        "maxi-batches, 32 texts a batch": TricksDataLoader(shuffled.dataset, sampler=fixed),
        f"maxi-batches, {options.max_tokens} tokens a batch": TricksDataLoader(shuffled.dataset, sampler=budget),
    }
    for name, loader in loaders.items():
        found = report(loader, lengths=lengths, ranks=options.ranks)
        print(f"{name}\n{found}\n")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    found.plot()[0].savefig(options.plot, dpi=120)
    print(f"The picture is {options.plot}")


if __name__ == "__main__":
    main()

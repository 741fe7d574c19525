"""`augment`: the same file however often it is killed, and what is in it."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from lightning_tricks.data import Augmentation, BackTranslation, MaskedReplacement, Paraphrase, augment, augmenting
from lightning_tricks.data._augment_rows import PROVENANCE, checksum
from lightning_tricks.data._similarity import similarity, words
from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.errors import DataError, MisconfigurationError
from tests.data import tiny_models

TEXTS = [
    ("a very lovely film", "good"),
    ("the plot is dull and the story is slow", "bad"),
    ("Great actor, great scene.", "good"),
    ('not quite good, "dull"\nand long', "bad"),
    ("the film is long and slow and not very good, not a great story and not a good scene at all", "bad"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("masked", "translation", "paraphrase")
    return {name: getattr(tiny_models, name)(tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "source.csv", TEXTS)


def written(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])
    return str(path)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ways(folders):
    return [
        MaskedReplacement(folders["masked"], share=0.4),
        BackTranslation(folders["translation"], folders["translation"], temperature=1),
        Paraphrase(folders["paraphrase"], temperature=1),
    ]


def run(source, out, folders, **options):
    return augment(source, out, ways(folders), **{"copies": 3, "max_tokens": 24, **options})


class Scripted(Augmentation):
    """Gives what a test says."""

    method, longest, models = "scripted", 30, ("none",)

    def __init__(self, answers, log=None):
        self.answers, self.log = answers, [] if log is None else log

    def load(self, device):
        return {}

    def lengths(self, texts):
        return [len(text.split()) for text in texts]

    def make(self, texts, seed):
        self.log.append((list(texts), seed))
        return [self.answers(text, seed) if callable(self.answers) else self.answers[text] for text in texts]


def test_rows_keep_the_label_and_say_where_they_come_from(source, folders, tmp_path):
    out = tmp_path / "out.csv"
    report = run(source, out, folders, seed=4)
    rows = rows_of(out)
    assert list(rows[0]) == ["text", "category", *PROVENANCE]
    models = {way.method: " ".join(way.models) for way in ways(folders)}
    for row in rows:
        text, label = TEXTS[int(row["source_row"]) - 1]
        assert (row["category"], row["source_checksum"], row["seed"]) == (label, checksum(text), "4")
        assert row["model"] == models[row["method"]]
        assert float(row["similarity"]) == pytest.approx(similarity(words(text), words(row["text"])), abs=1e-4)
        assert float(row["similarity"]) <= 0.9
    places = [(int(row["source_row"]), list(models).index(row["method"]), int(row["copy"])) for row in rows]
    assert places == sorted(set(places))
    assert set(models) == {row["method"] for row in rows}
    assert report.written == len(rows)
    tried = len(TEXTS) * 3 * 3 - 3 * report.too_long
    assert report.written + report.duplicates + report.empty == tried


def test_a_seed_decides(source, folders, tmp_path):
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        run(source, tmp_path / f"{number}.csv", folders, seed=seed)
        contents.append((tmp_path / f"{number}.csv").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_copies_come_from_different_draws_and_batches_are_of_like_length(source, tmp_path):
    log = []
    augment(source, tmp_path / "out.csv", [Scripted(lambda text, seed: f"{text} {seed}", log)], max_tokens=24, copies=2)
    assert len({seed for _, seed in log}) == len(log)
    assert Counter(text for texts, _ in log for text in texts) == {text: 2 for text, _ in TEXTS}
    lengths = [[len(text.split()) for text in texts] for texts, _ in log]
    assert all(max(found) * len(found) <= 24 for found in lengths)
    half = [length for found in lengths[: len(log) // 2] for length in found]
    assert half == sorted(half, reverse=True)


def test_killed_anywhere_it_goes_on_to_the_same_file(source, folders, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    journal = tmp_path / "cut.csv.unfinished"
    contents = []
    monkeypatch.setattr(augmenting.Journal, "add", spy(augmenting.Journal.add, contents))
    run(source, whole, folders)
    monkeypatch.undo()
    last = contents[-1]
    assert len(contents) > 10
    for length in (0, 5, *range(30, len(last), len(last) // 5), len(last) - 1, len(last)):
        journal.write_bytes(last[:length])
        run(source, cut, folders)
        assert cut.read_bytes() == whole.read_bytes(), length
        assert not journal.exists()
        cut.unlink()


def spy(add, contents):
    def spied(self, texts):
        add(self, texts)
        contents.append(self.path.read_bytes())

    return spied


def test_nothing_is_made_twice(source, tmp_path):
    log = []

    def answers(text, seed):
        if len(log) == 4:
            raise KeyboardInterrupt
        return f"{text} {seed}"

    out, method = tmp_path / "out.csv", Scripted(answers, log)
    with pytest.raises(KeyboardInterrupt):
        augment(source, out, [method], max_tokens=24, copies=2)
    assert not out.exists()
    first = list(log[:3])
    log.clear()
    method.answers = lambda text, seed: f"{text} {seed}"
    augment(source, out, [method], max_tokens=24, copies=2)
    assert not {seed for _, seed in log} & {seed for _, seed in first}
    again = list(log)
    assert augment(source, out, [method], max_tokens=24, copies=2).sources == len(TEXTS)
    assert log == again  # it is finished


KILLED = """
import os, signal, sys
from lightning_tricks.data import MaskedReplacement, augment, augmenting

add = augmenting.Journal.add
def killing(self, texts):
    add(self, texts)
    if len(self.batches) == int(sys.argv[4]):
        with self.path.open("ab") as file:
            file.write(b'["half a li')
        os.kill(os.getpid(), signal.SIGKILL)
augmenting.Journal.add = killing
augment(sys.argv[1], sys.argv[2], [MaskedReplacement(sys.argv[3])], copies=6, max_tokens=24)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_goes_on_with(source, folders, tmp_path):
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    for batches in ("3", "7"):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), source, str(out), folders["masked"], batches]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ})
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        assert not out.exists()
    options = {"copies": 6, "max_tokens": 24}
    augment(source, out, [MaskedReplacement(folders["masked"])], **options)
    augment(source, whole, [MaskedReplacement(folders["masked"])], **options)
    assert out.read_bytes() == whole.read_bytes()


def test_duplicates_and_empty_texts_are_left_out(tmp_path):
    long = " ".join(f"word{letter}" for letter in "abcdefghijklmnopqrst")
    answers = {
        "a lovely film": "A LOVELY film!",  # its source
        "a dull film": "A lovely film.",  # another source, which may be a test text
        "a slow film": " .. ",
        "a long film": "",
        long: f"{long} more",  # a near-duplicate
        "the first": "the same",
        "the second": "The same.",  # as that of another source
    }
    source = written(tmp_path / "source.csv", [(text, "x") for text in answers])
    report = augment(source, tmp_path / "out.csv", [Scripted(answers)])
    assert [(row["text"], row["source_row"]) for row in rows_of(tmp_path / "out.csv")] == [("the same", "6")]
    assert (report.written, report.duplicates, report.empty, report.too_long) == (1, 4, 2, 0)


def test_copies_of_one_source_that_are_alike_are_left_out(tmp_path):
    words_ = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]
    source = written(tmp_path / "source.csv", [("quite another text", "x")])
    made = iter([" ".join(words_), " ".join([*words_, "more"]), " ".join(reversed(words_))])
    augment(source, tmp_path / "out.csv", [Scripted(lambda text, seed: next(made))], copies=3)
    assert [row["copy"] for row in rows_of(tmp_path / "out.csv")] == ["0", "2"]


def test_texts_too_long_for_the_model_are_counted(folders, tmp_path):
    source = written(tmp_path / "source.csv", [("film " * 60, "x"), ("a lovely film", "y")])
    report = augment(source, tmp_path / "out.csv", [MaskedReplacement(folders["masked"])])
    assert (report.sources, report.too_long) == (2, 1)
    assert {row["source_row"] for row in rows_of(tmp_path / "out.csv")} == {"2"}
    with pytest.raises(MisconfigurationError, match="Every text has more than the 24 tokens"):
        augment(written(tmp_path / "long.csv", [("film " * 60, "x")]), tmp_path / "o.csv", ways(folders)[:1])


def test_another_run_is_not_gone_on_with(source, folders, tmp_path):
    out = tmp_path / "out.csv"
    journal = tmp_path / "out.csv.unfinished"
    contents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmenting.Journal, "add", spy(augmenting.Journal.add, contents))
        run(source, out, folders)
    finished = out.read_bytes()
    with pytest.raises(
        MisconfigurationError, match=r"is there already, of a run with `options` \[3, 0.9, 24, 0\], not"
    ):
        run(source, out, folders, seed=1)
    assert out.read_bytes() == finished
    out.write_bytes(finished + b"x")
    with pytest.raises(MisconfigurationError, match="is there already, of a run with other contents"):
        run(source, out, folders)
    out.unlink()
    journal.write_bytes(contents[2])
    with pytest.raises(MisconfigurationError, match=r"out.csv.unfinished` is of a run with `options`"):
        run(source, out, folders, seed=1)
    other = tiny_models.masked(tmp_path / "other", seed=1)
    with pytest.raises(MisconfigurationError, match=r"is of a run with `methods`"):
        augment(source, out, [MaskedReplacement(other, share=0.4), *ways(folders)[1:]], copies=3, max_tokens=24)
    journal.write_bytes(contents[2].replace(b'["', b"[", 1) + b"\n")
    with pytest.raises(DataError, match=r"out.csv.unfinished` is damaged"):
        run(source, out, folders)


def test_what_was_asked_for_lies_beside_the_file(source, folders, tmp_path):
    run(source, tmp_path / "out.csv", folders)
    found = json.loads((tmp_path / "out.csv.json").read_text())
    assert [method[0] for method in found["asked"]["methods"]] == [way.method for way in ways(folders)]
    assert found["counts"]["sources"] == len(TEXTS)


def test_bad_input_is_named_before_any_work(source, folders, tmp_path):
    out, method = tmp_path / "out.csv", MaskedReplacement(folders["masked"])
    log = []
    minilm = MaskedReplacement(str(minilm_folder()))
    for make, error, message in (
        (lambda: augment("none.csv", out, [method]), DataError, "There is no file `none.csv`"),
        (lambda: augment(source, out, [method], text="remark"), DataError, "has no column `remark`"),
        (lambda: augment(source, out, [method], label="categories"), DataError, "Did you mean `category`"),
        (lambda: augment(source, out, []), MisconfigurationError, "at least one `Augmentation`"),
        (lambda: augment(source, out, ["masked"]), MisconfigurationError, "at least one `Augmentation`"),
        (lambda: augment(source, tmp_path / "o.tsv", [method]), MisconfigurationError, "`.csv` file, got"),
        (lambda: augment(source, out, [method], copies=0), MisconfigurationError, "`copies` must be"),
        (lambda: augment(source, out, [method], seed=-1), MisconfigurationError, "`seed` must be"),
        (lambda: augment(source, out, [method], max_tokens=0), MisconfigurationError, "`max_tokens` must be"),
        (lambda: augment(source, out, [method], max_similarity=2), MisconfigurationError, "from 0 to 1, got 2"),
        (lambda: augment(source, out, [method], device="cuda:99"), MisconfigurationError, "`device=cuda:99` is not"),
        (lambda: augment(source, out, [method], device="gpu"), MisconfigurationError, "`device=gpu` is not"),
        (lambda: augment(source, out, [Scripted({}, log), minilm]), MisconfigurationError, "no trained head"),
        (lambda: augment(source, out, [method], text="category"), MisconfigurationError, "must differ"),
        (lambda: augment(source, source + "/x/out.csv", [method]), MisconfigurationError, "cannot be made"),
    ):
        with pytest.raises(error, match=message):
            make()
    blank = written(tmp_path / "blank.csv", [("a film", "x"), ("another", " ")])
    with pytest.raises(DataError, match=r"Column `category` of .* is blank in 1 of 2 rows: row 2"):
        augment(blank, out, [method])
    assert not log
    assert not list(tmp_path.glob("out.csv*"))

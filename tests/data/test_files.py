"""Reading the user's files: every format and compression, and each way a file can be wrong."""

import bz2
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lightning_tricks.data.files import read_columns, refuse_nulls
from lightning_tricks.errors import DataError, MissingDependencyError

TEXTS = ['He said "no", twice', "two\nlines", "tab\there", "naïve ünï", "last"]
LABELS = ["a", "b", "a", "b", "a"]
COLUMNS = {"text": TEXTS, "label": LABELS}


def delimited(delimiter):
    def quote(value):
        return '"' + value.replace('"', '""') + '"'

    rows = [
        ["id", "text", "label"],
        *([str(i), quote(t), c] for i, (t, c) in enumerate(zip(TEXTS, LABELS, strict=True))),
    ]
    return "".join(delimiter.join(row) + "\r\n" for row in rows).encode()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(5), **COLUMNS}), sink)
    return sink.getvalue().to_pybytes()


def jsonl():
    rows = [{"id": i, "text": t, "label": c} for i, (t, c) in enumerate(zip(TEXTS, LABELS, strict=True))]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


CONTENT = {".csv": delimited(","), ".tsv": delimited("\t"), ".parquet": parquet(), ".jsonl": jsonl()}
COMPRESS = {"": bytes, ".bz2": bz2.compress, ".gz": gzip.compress}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_format_and_compression(tmp_path, suffix, compression):
    path = tmp_path / f"some.texts{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](CONTENT[suffix]))
    assert read_columns(path, ["text", "label"]) == COLUMNS
    assert read_columns(str(path), ["label"]) == {"label": LABELS}


@pytest.mark.parametrize("suffix", CONTENT)
def test_missing_column_lists_those_present_and_names_the_nearest(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(CONTENT[suffix])
    with pytest.raises(
        DataError, match=r"no column `lable`. Its columns are `id`, `text`, `label`. Did you mean `label`"
    ):
        read_columns(path, ["text", "lable"])


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"There is no file `.*gone.csv`"):
        read_columns(tmp_path / "gone.csv", ["text"])


@pytest.mark.parametrize("name", ["texts.xlsx", "texts", "texts.gz", "review"])
def test_unknown_format(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"is unknown. Known are .csv, .tsv, .parquet, .jsonl, each plain or with .bz2"):
        read_columns(tmp_path / name, ["text"])


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".csv.gz"])
def test_empty_file(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match="is empty"):
        read_columns(path, ["text"])


def test_header_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="has no rows"):
        read_columns(tmp_path / "a.csv", ["text"])
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_columns(tmp_path / "a.parquet", ["text"])


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.bz2", "a.parquet"])
def test_truncated_file(tmp_path, name):
    whole = CONTENT[".parquet"] if name == "a.parquet" else COMPRESS[name[5:]](CONTENT[".csv"] * 50)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        read_columns(tmp_path / name, ["text"])


def test_not_compressed_as_its_name_says(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(CONTENT[".csv"])
    with pytest.raises(DataError, match="cannot be read"):
        read_columns(tmp_path / "a.csv.gz", ["text"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nfine,a\nwell, well,b\n", "Row 2 of .* has 3 fields, the header 2. Quote fields that hold ','"),
        ('text,label\n"unbalanced,a\nswallowed,b\n', "is not well-formed: unexpected end of data"),
    ],
)
def test_malformed_csv(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_columns(tmp_path / "a.csv", ["text"])


def test_malformed_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"Line 2 of .* is not JSON"):
        read_columns(path, ["text"])
    path.write_text('["text"]\n')
    with pytest.raises(DataError, match=r"Line 1 of .* is not a JSON object"):
        read_columns(path, ["text"])


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nnaïve\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 .*at byte 7"):
        read_columns(tmp_path / "a.csv", ["text"])


def test_short_rows_and_absent_keys_are_nulls(tmp_path):
    (tmp_path / "a.csv").write_text("label,text\na,one\nb\n")
    assert read_columns(tmp_path / "a.csv", ["text"]) == {"text": ["one", None]}
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"label": "b"}\n{"text": null}\n')
    assert read_columns(tmp_path / "a.jsonl", ["text"]) == {"text": ["one", None, None]}


def test_nulls_are_counted_and_their_rows_named():
    refuse_nulls(["a", 0], "text", "a.csv")
    with pytest.raises(DataError, match=r"`text` of `a.csv` is blank in 7 of 8 rows: rows 2, 3, 4, 5, 6 and 2 more."):
        refuse_nulls(["a", None, "", " \t", float("nan"), "", "", ""], "text", "a.csv")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(CONTENT[".parquet"])
    with pytest.raises(MissingDependencyError, match=r"Run: pip install pyarrow$"):
        read_columns(tmp_path / "a.parquet", ["text"])

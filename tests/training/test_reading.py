"""CSV, Parquet and folders of data sets: the same examples as from JSON lines, and faults named by column and row."""

from __future__ import annotations

import csv
import json
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from prefixcore.training import DataError, describe_data, read_examples

ROWS = [
    {"prompt": "Peru ->", "completion": " Lima"},
    {"prompt": 'a "quoted", long\ntext', "completion": " é"},
    {"prompt": "", "completion": "c"},
]


def write(folder, kind, rows):
    """A file or folder of that kind."""
    path = folder / f"data{kind}"
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_the_same_examples(tmp_path, kind):
    path = write(tmp_path, kind, [{"id": str(number), **row} for number, row in enumerate(ROWS)])
    examples = read_examples(path)
    assert [(each.prompt, each.completion) for each in examples] == [tuple(row.values()) for row in ROWS]
    assert describe_data(examples) == describe_data(read_examples(write(tmp_path, ".jsonl", ROWS)))
    places = {".parquet": "row 3", "": "row 3", ".jsonl": "line 3", ".json": "item 3"}
    assert examples[2].source == f"{path}, {places.get(kind, 'line 5')}"  # the quoted text has a line break


@pytest.mark.parametrize("kind", [".csv", ".parquet", ""])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "1: the column 'prompt' is missing (found: question, answer)"),
        ([{"prompt": "a", "answer": "b"}], "the column 'completion' is missing (found: prompt"),
        ([*ROWS, {"prompt": "a", "completion": ""}], "the column 'completion' is empty"),
    ],
)
def test_faults_are_named_by_column(tmp_path, kind, rows, message):
    path = write(tmp_path, kind, rows)
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}, ")
    assert message.removeprefix("1: " if kind == ".csv" else "") in str(error.value)


@pytest.mark.parametrize("kind", [".parquet", ""])
def test_what_is_no_text(tmp_path, kind):
    for value, what in ((7, "a number"), (None, "null")):
        rows = [{"prompt": "a", "completion": value}]
        with pytest.raises(DataError, match=f"row 1: the column 'completion' must be a string, got {what}"):
            read_examples(write(tmp_path / what, kind, rows) if (tmp_path / what).mkdir() is None else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b,c\n", "line 2: 3 values, but the header has 2 columns (prompt, completion)"),
        ("prompt,completion\na\n", "line 2: 1 values, but"),
        ('prompt,completion\n"a,b\n', "line 2: not valid CSV (unexpected end of data)"),
        ("prompt,completion\n", "no examples; expected rows of prompt and completion"),
        ("", "no examples"),
    ],
)
def test_csv_that_is_none(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read_examples(tmp_path / "x.csv")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_other_names(tmp_path, kind):
    """Also beside one that has the usual name and is another."""
    rows = [{"prompt": "no", "question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    path = write(tmp_path, kind, rows)
    examples = read_examples(path, columns=("question", "answer"))
    assert [(each.prompt, each.completion) for each in examples] == [tuple(row.values()) for row in ROWS]
    with pytest.raises(DataError, match=r"'what' is missing \(found: .*\); what they are called can be said"):
        read_examples(path, columns=("what", "answer"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_header_says_what_parts_the_columns(tmp_path, suffix, delimiter):
    """A spreadsheet writes what is usual where it runs."""
    path = tmp_path / f"x{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["id", "prompt", "completion"], ["1", "a;b,\tc", " d"]])
    assert [(each.prompt, each.completion) for each in read_examples(path)] == [("a;b,\tc", " d")]


def test_a_field_may_be_a_whole_document(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f"prompt,completion\n{'a' * (before + 1)},b\n")
    assert len(read_examples(tmp_path / "x.csv")[0].prompt) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "prompt": "a"\n}', "column 1); expected an object on each line, or one list of objects"),
        ('[\n{"prompt": "a" "completion": "b"}]', "not valid JSON (Expecting ',' delimiter, line 2, column 16)"),
        ('[{"prompt": "a", "completion": "b"}, 3]', "item 2: expected a JSON object, got a number"),
        ('[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]', "item 2: the field 'completion' is missing"),
        ("[]", "no examples; expected lines like"),
    ],
)  # fmt: skip
def test_json_that_is_no_list_of_objects(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError) as error:
        read_examples(tmp_path / "x.json")
    assert message in str(error.value)


def test_damaged_files(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="x.parquet: not a Parquet file that pyarrow can read"):
        read_examples(tmp_path / "x.parquet")
    folder = write(tmp_path, "", ROWS)
    next(folder.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(DataError, match="datasets cannot read it"):
        read_examples(folder)
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\na,\xe9\n")
    with pytest.raises(DataError, match="x.csv: not UTF-8 text"):
        read_examples(tmp_path / "x.csv")


def test_several_splits_are_asked_for(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="holds the splits test, train; name one of them, as .*both/test"):
        read_examples(tmp_path / "both")
    assert len(read_examples(tmp_path / "both" / "train")) == 3


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    path, folder = write(tmp_path, ".parquet", ROWS), write(tmp_path, "", ROWS)
    for name in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs pyarrow; pip install 'prefixcore\[data\]'"):
        read_examples(path)
    with pytest.raises(DataError, match=r"needs datasets; pip install 'prefixcore\[data\]'"):
        read_examples(folder)


def test_what_is_not_there(tmp_path):
    for path in (tmp_path / "no.csv", tmp_path / "no.parquet", tmp_path / "no"):
        with pytest.raises(DataError, match="no such file; expected JSON lines, CSV or Parquet"):
            read_examples(path)
    with pytest.raises(
        DataError, match="is not a regular file; expected .* or a folder that Dataset.save_to_disk wrote"
    ):
        read_examples(tmp_path)


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_column_that_is_there_twice(tmp_path, kind):
    """Which of the two is meant is not guessed; columns that are not read may be as they like."""
    for names, is_fine in ((("id", "id", "prompt", "completion"), True), (("prompt", "prompt", "completion"), False)):
        path = tmp_path / f"{len(names)}{kind}"
        values = [str(place) for place in range(len(names))]
        if kind == ".csv":
            path.write_text(",".join(names) + "\n" + ",".join(values) + "\n")
        else:
            arrays = [pyarrow.array([value]) for value in values]
            parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(names)), path)
        if is_fine:
            [example] = read_examples(path)
            assert (example.prompt, example.completion) == ("2", "3")
        else:
            with pytest.raises(DataError, match="2 columns are called 'prompt'"):
                read_examples(path)

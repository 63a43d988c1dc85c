import gzip
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.gru_svm import RecordError, RecordSchema, read_records

FIELDS = {"size": "continuous", "note": "ignored", "flag": "categorical", "kind": "label"}
CLASSES = {"no": "normal", "yes": "attack"}
SCHEMA = RecordSchema(FIELDS, CLASSES)
NAMED = RecordSchema(FIELDS, CLASSES, header=True)
GOOD = ["1,x,SF,no", " 2.5e3 ,,S0 , yes", '-7,"a,b","S,1",no']


def test_records_by_column():
    records = read_records(GOOD, SCHEMA)
    assert len(records) == 3
    assert records.columns["size"].tolist() == [1, 2500, -7]
    assert records.columns["flag"].tolist() == ["SF", "S0", "S,1"]
    assert records.columns.keys() == {"size", "flag"}
    assert records.labels.tolist() == [0, 1, 0]
    assert records.lines.tolist() == [1, 2, 3]
    assert records.problems == ()


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files(tmp_path, suffix, mark):
    path = tmp_path / f"records.{suffix}"
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(path, "wt", encoding="utf8") as file:
        file.write(mark + "\r\n".join(GOOD) + "\r\n")
    for source in (path, str(path)):
        assert read_records(source, SCHEMA).columns["size"].tolist() == [1, 2500, -7]


def test_a_header_names_the_columns_in_any_order():
    lines = ["kind, flag,size", "yes,SF,3", "no,S0,4"]
    records = read_records(lines, NAMED)
    assert records.columns["size"].tolist() == [3, 4]
    assert records.labels.tolist() == [1, 0]
    assert records.lines.tolist() == [2, 3]
    for header, line in (("flag,size", "SF,3"), ("kind,flag,size", "anything,SF,3")):
        alone = read_records([header, line], NAMED, labelled=False)
        assert alone.labels is None
        assert alone.columns["size"].tolist() == [3]


def test_without_labels_lines_hold_the_features_alone():
    records = read_records(["5,SF"], SCHEMA, labelled=False)
    assert (records.labels, records.columns["size"].tolist()) == (None, [5])


BAD = [
    ("1,x,SF", "4 values are expected, found 3"),
    ("1,x,SF,no,more", "4 values are expected, found 5"),
    ("", "4 values are expected, found 0"),
    ("one,x,SF,no", "column 'size' must hold a finite number, found 'one'"),
    (",x,SF,no", "column 'size' must hold a finite number, found ''"),
    ("nan,x,SF,no", "found 'nan'"),
    ("1e999,x,SF,no", "found '1e999'"),
    ("1_000,x,SF,no", "found '1_000'"),
    ("1,x, ,no", "column 'flag' is empty"),
    ("1,x,SF,maybe", r"label 'maybe' of column 'kind' .* none of the classes \['normal', 'attack'"),
    ("1,x,SF,", "label '' of column 'kind'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_malformed_lines_are_refused_by_number(line, reason):
    with pytest.raises(RecordError, match=f"1 of 4 records of .* line 3: .*{reason}") as caught:
        read_records([*GOOD[:2], line, GOOD[2]], SCHEMA)
    assert [problem.line for problem in caught.value.problems] == [3]


def test_malformed_lines_are_left_out_on_request_and_listed(caplog):
    lines = [line for pair in zip(BAD, GOOD * 4, strict=False) for line in (pair[0][0], pair[1])]
    records = read_records(lines, SCHEMA, malformed="leave_out")
    assert records.lines.tolist() == list(range(2, 2 * len(BAD) + 1, 2))
    assert [problem.line for problem in records.problems] == list(range(1, 2 * len(BAD), 2))
    assert "11 of 22 records of the text given are malformed and left out: line 1: " in caplog.text
    with pytest.raises(RecordError, match="11 of 22 .*; and 6 more. Mend them"):
        read_records(lines, SCHEMA)


def test_an_empty_star_label_is_still_malformed():
    schema = RecordSchema(FIELDS, {"no": "normal", "*": "attack"})
    assert read_records(["1,x,SF,whatever"], schema).labels.tolist() == [1]
    with pytest.raises(RecordError, match="label ''"):
        read_records(["1,x,SF,"], schema)


def test_a_record_over_several_lines_has_the_number_of_its_first():
    lines = ['1,"two\n', 'lines",SF,no\n', "2,x,SF,no\n", "bad,x,SF,no\n"]
    records = read_records(lines, SCHEMA, malformed="leave_out")
    assert records.lines.tolist() == [1, 3]
    assert [problem.line for problem in records.problems] == [4]


def test_lines_that_an_open_quotation_mark_takes_in_are_told():
    lines = [f"{line}\n" for line in (GOOD[0], '1,"x,SF,no', *GOOD)]
    records = read_records(lines, SCHEMA, malformed="leave_out")
    assert len(records) == 1
    assert str(records.problems[0]).startswith("line 2: 4 values are expected, found")
    assert str(records.problems[0]).endswith("a quotation mark takes in the lines up to 5")


def test_a_field_beyond_every_limit_costs_its_lines_alone():
    many = [f"{GOOD[0]}\n"] * 50_000
    records = read_records([*many[:5], '1,"x,SF,no\n', *many], SCHEMA, malformed="leave_out")
    (problem,) = records.problems
    assert problem.line == 6
    assert "it cannot be read: field larger than field limit" in problem.reason
    taken_in = re.search(r"a quotation mark takes in the lines up to (\d+)", problem.reason)
    end = int(taken_in[1])
    assert 6 < end < 50_006
    assert records.lines.tolist() == [1, 2, 3, 4, 5, *range(end + 1, 50_007)]
    with pytest.raises(RecordError, match="1 of 2 records .* line 2: it cannot be read"):
        read_records([GOOD[0], "1," + "x" * 200_000 + ",SF,no"], SCHEMA)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*GOOD, *(line for line, _ in BAD)]), min_size=1, max_size=30))
def test_no_line_is_lost(lines):
    kept: list[int] = []
    try:
        records = read_records(lines, SCHEMA, malformed="leave_out")
    except RecordError as error:
        problems = error.problems
    else:
        problems, kept = records.problems, records.lines.tolist()
    assert sorted([*kept, *(p.line for p in problems)]) == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["size,flag", "1,SF"], r"lacks the columns \['kind'\]; it has \['size', 'flag'\]"),
        (["size,flag,kind,port", "1,SF,no,3"], "list what is no feature there as 'ignored'"),
        (["size,flag,kind,size", "1,SF,no,3"], "each once"),
        ([], r"lacks the columns \['size', 'flag', 'kind'\]"),
        (["size,flag,kind"], "There is no record in the text given"),
    ],
)
def test_bad_headers_are_refused(lines, message):
    with pytest.raises(RecordError, match=message):
        read_records(lines, NAMED)


def test_damaged_files_are_refused(tmp_path):
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"1,x,SF,no\n" * 1000)[:-9])
    with pytest.raises(RecordError, match="cut.csv.gz' is damaged"):
        read_records(cut, SCHEMA)
    plain = tmp_path / "plain.csv.gz"
    plain.write_text("1,x,SF,no\n")
    with pytest.raises(RecordError, match="plain.csv.gz' is damaged"):
        read_records(plain, SCHEMA)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("1,é,SF,no\n".encode("latin1"))
    with pytest.raises(RecordError, match="latin.csv' is not text in UTF-8"):
        read_records(latin, SCHEMA)
    flipped = tmp_path / "flipped.csv.gz"
    packed = bytearray(gzip.compress(b"1,x,SF,no\n" * 1000))
    packed[12:20] = bytes(8)
    flipped.write_bytes(packed)
    with pytest.raises(RecordError, match="flipped.csv.gz' is damaged"):
        read_records(flipped, SCHEMA)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(RecordError, match="There is no record in '.*empty.csv'"):
        read_records(tmp_path / "empty.csv", SCHEMA)
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        read_records(tmp_path / "absent.csv", SCHEMA)


def test_other_words_for_malformed_are_refused():
    with pytest.raises(ValueError, match="`malformed` must be one of .*got 'drop'"):
        read_records(GOOD, SCHEMA, malformed="drop")


def test_select_keeps_what_belongs_together():
    chosen = read_records(GOOD, SCHEMA).select(np.array([2, 0]))
    assert chosen.lines.tolist() == [3, 1]
    assert chosen.labels.tolist() == [0, 0]
    assert chosen.columns["flag"].tolist() == ["S,1", "SF"]

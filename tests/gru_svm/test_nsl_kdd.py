import pytest

from hf_vqlogits.gru_svm import RecordError, nsl_kdd_schema, read_records

LINE = (
    "0,tcp,ftp_data,SF,491,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,2,2,0.00,0.00,0.00,0.00,1.00,0.00,"
    "0.00,150,25,0.17,0.03,0.17,0.00,0.00,0.00,0.05,0.00,{},20"
)


def test_columns_stand_where_the_files_have_them():
    schema = nsl_kdd_schema()
    assert (len(schema.columns), len(schema.features)) == (43, 41)
    records = read_records([LINE.format("normal"), LINE.format("mscan")], schema)
    assert records.labels.tolist() == [0, 1]
    one = {name: values[0] for name, values in records.columns.items()}
    assert (one["protocol_type"], one["service"], one["flag"]) == ("tcp", "ftp_data", "SF")
    numbers = [one[name] for name in ("src_bytes", "dst_host_count", "dst_host_rerror_rate")]
    assert numbers == [491, 150, 0.05]


def test_five_classes():
    schema = nsl_kdd_schema("five")
    assert schema.class_names == ("normal", "dos", "probe", "r2l", "u2r")
    labels = ["normal", "neptune", "mscan", "warezclient", "ps", "unheard_of"]
    assert [schema.class_of(label) for label in labels] == [0, 1, 2, 3, 4, None]
    assert len(schema.classes) == 40  # 39 attacks, each in one family


def test_a_label_of_neither_class_is_refused():
    schema = nsl_kdd_schema()
    labels = ["normal", "neptune", "xterm", "Normal", "normal.", "21", "neptun"]
    assert [schema.class_of(label) for label in labels] == [0, 1, 1, None, None, None, None]
    with pytest.raises(RecordError, match="line 2.*'Normal'"):
        read_records([LINE.format("normal"), LINE.format("Normal")], schema)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match="must be 'two' or 'five', got 'three'"):
        nsl_kdd_schema("three")

import json

import pytest

from hf_vqlogits.gru_svm import RecordSchema

COLUMNS = {"a": "continuous", "skip": "ignored", "b": "categorical", "y": "label"}
CLASSES = {"no": "normal", "dos": "attack", "u2r": "attack"}


def test_what_it_says():
    schema = RecordSchema(COLUMNS, CLASSES)
    assert schema.features == ("a", "b")
    assert schema.label == "y"
    assert schema.class_names == ("normal", "attack")
    assert [schema.class_of(label) for label in ("no", "dos", "u2r", "?")] == [0, 1, 1, None]


def test_a_star_is_every_other_label():
    schema = RecordSchema(COLUMNS, {"no": "normal", "*": "attack"})
    assert [schema.class_of(label) for label in ("no", "dos", "?")] == [0, 1, 1]


def test_survives_json_with_sorted_keys(tmp_path):
    # Orders that sorting would change.
    schema = RecordSchema(dict(reversed(COLUMNS.items())), {"z": "one", "a": "two"}, header=True)
    text = json.dumps(schema.to_dict(), sort_keys=True)
    loaded = RecordSchema.from_dict(json.loads(text))
    assert loaded == schema
    assert hash(loaded) == hash(schema)
    assert list(loaded.columns) == ["y", "b", "skip", "a"]
    assert RecordSchema(COLUMNS, schema.classes, header=True) != schema
    (tmp_path / "schema.json").write_text(text)
    assert RecordSchema.from_json_file(tmp_path / "schema.json") == schema


@pytest.mark.parametrize(
    ("columns", "classes", "message"),
    [
        ({**COLUMNS, "c": "number"}, CLASSES, "'c' must be one of .*got 'number'"),
        ({"a": "continuous"}, CLASSES, r"one column of kind 'label', got \[\]"),
        ({**COLUMNS, "z": "label"}, CLASSES, r"one column of kind 'label', got \['y', 'z'\]"),
        ({"y": "label", "x": "ignored"}, CLASSES, "without a feature"),
        (COLUMNS, {"no": "normal"}, r"at least two classes, got \['normal'\]"),
        (COLUMNS, {}, "at least two classes"),
        (COLUMNS, {"a": 1, "b": 2}, "`classes` must be made of texts"),
        ({" a": "continuous", "y": "label"}, CLASSES, "without spaces at their ends"),
        ([["a", "continuous"], ["a", "label"]], CLASSES, "every key once"),
        (3, CLASSES, "`columns` must be a mapping or pairs of texts, got 3"),
    ],
)
def test_impossible_schemas_are_refused(columns, classes, message):
    with pytest.raises(ValueError, match=message):
        RecordSchema(columns, classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "schema.json' cannot be used: Expecting"),
        ("[]", "needs the fields `columns` and `classes`.*got list"),
        ('{"columns": {}}', r"got \['columns'\]"),
        ('{"columns": {}, "classes": {}, "colour": 1}', "colour"),
        ('{"columns": {"y": "label"}, "classes": {}, "header": 1}', "`header` must be true"),
    ],
)
def test_files_that_hold_no_schema_are_refused(tmp_path, text, message):
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        RecordSchema.from_json_file(tmp_path / "schema.json")

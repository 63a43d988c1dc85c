import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor

from hf_vqlogits.gru_svm import (
    GRUSVMConfig,
    GRUSVMFeatureExtractor,
    GRUSVMForSequenceClassification,
    RecordError,
    RecordSchema,
    read_records,
)

SCHEMA = RecordSchema(
    # Not in the order of the alphabet, which sorted JSON would make of it.
    {"size": "continuous", "flag": "categorical", "kind": "label", "age": "continuous"},
    {"no": "normal", "yes": "attack", "odd": "strange"},
)
TRAIN = ["1,SF,no,5", "2,S0,yes,5", "3,SF,odd,5", "4,RE,yes,5"]


@pytest.fixture(params=["quantile", "standardise"])
def fitted(request):
    extractor = GRUSVMFeatureExtractor(SCHEMA, continuous=request.param, num_bins=4)
    return extractor.fit(extractor.read(TRAIN))


def test_features_are_time_steps_in_the_order_of_the_columns(fitted):
    features = fitted(fitted.read(TRAIN), return_tensors="pt")
    inputs = features["input_values"]
    assert (inputs.shape, inputs.dtype) == ((4, 3, 1), torch.float32)
    assert (features["labels"].tolist(), features["labels"].dtype) == ([0, 1, 2, 1], torch.int64)
    torch.testing.assert_close(inputs[:, 1, 0], torch.tensor([1.0, 2 / 3, 1.0, 1 / 3]))
    assert not inputs[:, 2].any()
    sizes = np.arange(1, 5)
    wanted = (sizes - 2.5) / np.sqrt(1.25)
    if fitted.continuous == "quantile":
        wanted = np.searchsorted(fitted.encodings["size"]["edges"], sizes) / 3
        assert wanted[0] == 0
        assert wanted[-1] == 1
    np.testing.assert_allclose(inputs[:, 0, 0].numpy(), wanted, rtol=1e-6)


def test_only_training_data_decide(fitted):
    before = json.loads(fitted.to_json_string())
    one = fitted(fitted.read(["2,SF,no,5"]))["input_values"]
    many = fitted(fitted.read(["2,SF,no,5", "900,XX,yes,7", "-900,S0,odd,-7"]))["input_values"]
    np.testing.assert_array_equal(one[0], many[0])
    assert json.loads(fitted.to_json_string()) == before
    with pytest.raises(RuntimeError, match="is fitted already"):
        fitted.fit(fitted.read(TRAIN))


def test_unknown_categories_are_told_by_line(fitted, caplog):
    records = fitted.read(["1,SF,no,5", "1,XX,no,5", "1,S0,no,5", "1,YY,no,5"])
    with caplog.at_level(logging.WARNING):
        inputs = fitted(records)["input_values"]
    assert inputs.shape[0] == 4
    assert inputs[[1, 3], 1, 0].tolist() == [0, 0]
    assert "2 values are categories" in caplog.text
    assert "line 2: column 'flag' has the category 'XX'" in caplog.text
    assert [problem.line for problem in fitted.unknown_categories(records)] == [2, 4]


def test_constant_features_are_told_and_stay(caplog):
    extractor = GRUSVMFeatureExtractor(SCHEMA)
    with caplog.at_level(logging.WARNING):
        extractor.fit(extractor.read(TRAIN))
    assert "one value in all 4 training records and tell nothing: age" in caplog.text
    assert extractor.constant_features == ("age",)
    assert extractor.sequence_length == 3
    assert not extractor(extractor.read(["1,SF,no,77"]))["input_values"][:, 2].any()


def test_saved_beside_the_model(fitted, tmp_path):
    config = GRUSVMConfig(
        sequence_length=fitted.sequence_length,
        hidden_size=4,
        id2label=fitted.id2label,
        label2id=fitted.label2id,
    )
    model = GRUSVMForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)
    for loader in (AutoFeatureExtractor, GRUSVMFeatureExtractor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is GRUSVMFeatureExtractor
        assert loaded.to_dict() == fitted.to_dict()
        records = loaded.read(TRAIN)
        np.testing.assert_array_equal(
            loaded(records)["input_values"], fitted(fitted.read(TRAIN))["input_values"]
        )
    output = model(**loaded(records, return_tensors="pt"))
    assert output.logits.shape == (4, 3)
    assert model.config.id2label == {0: "normal", 1: "attack", 2: "strange"}
    # The type of the model is enough, where the file does not name the class.
    file = tmp_path / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    del stored["feature_extractor_type"]
    file.write_text(json.dumps(stored))
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is GRUSVMFeatureExtractor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("size"), "of the feature 'size', got None.*damaged"),
        (lambda found: found["flag"].update(categories=[]), "of the feature 'flag'"),
        (lambda found: found["flag"].update(categories=["b", "a"]), "of the feature 'flag'"),
        (lambda found: found["size"].update(edges=[2.0, 1.0]), "of the feature 'size'"),
        (lambda found: found["size"].update(edges=[float("nan")]), "of the feature 'size'"),
        (lambda found: found.update(size={"mean": 1.0, "deviation": 2.0}), "'edges'.*'size'"),
        (lambda found: found.update(port={"edges": []}), r"has \['port'\], which are no features"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    extractor = GRUSVMFeatureExtractor(SCHEMA)
    extractor.fit(extractor.read(TRAIN)).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    change(stored["encodings"])
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        AutoFeatureExtractor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["1,SF,no,5", "2,S0,no,5"], RecordError, "All 2 .*'normal'; records of 'attack' or"),
        (["1,SF,no,5", "1,SF,yes,5"], ValueError, "Every feature is constant in the 2 records"),
    ],
)
def test_training_data_that_teach_nothing_are_refused(lines, error, message):
    extractor = GRUSVMFeatureExtractor(SCHEMA)
    with pytest.raises(error, match=message):
        extractor.fit(extractor.read(lines))
    assert extractor.encodings is None


def test_a_class_without_records_is_told(caplog):
    extractor = GRUSVMFeatureExtractor(SCHEMA)
    with caplog.at_level(logging.WARNING):
        extractor.fit(extractor.read(TRAIN[:2]))
    assert "No training record is of the classes strange" in caplog.text


def test_numbers_too_large_are_told_by_column():
    extractor = GRUSVMFeatureExtractor(SCHEMA, continuous="standardise")
    with pytest.raises(ValueError, match="Column 'size' cannot be standardised: .*quantile"):
        extractor.fit(extractor.read(["1e308,SF,no,5", "-1e308,S0,yes,5"]))


def test_misuse_is_refused(fitted):
    fresh = GRUSVMFeatureExtractor(SCHEMA)
    with pytest.raises(RuntimeError, match="is not fitted: call `fit`"):
        fresh(fresh.read(TRAIN))
    other = RecordSchema({"size": "continuous", "kind": "label"}, {"no": "a", "yes": "b"})
    with pytest.raises(ValueError, match=r"lack the columns \['flag', 'age'\]"):
        fitted(read_records(["1,no"], other))
    swapped = RecordSchema(SCHEMA.columns, dict(reversed(SCHEMA.classes.items())))
    with pytest.raises(ValueError, match="have another schema"):
        fitted(read_records(TRAIN, swapped))
    with pytest.raises(TypeError, match="must be TrafficRecords, got list"):
        fitted(TRAIN)
    with pytest.raises(ValueError, match="`continuous` must be one of .*got 'log'"):
        GRUSVMFeatureExtractor(SCHEMA, continuous="log")
    for bins in (1, 2.5, True):
        with pytest.raises(ValueError, match="`num_bins` must be an integer of at least 2"):
            GRUSVMFeatureExtractor(SCHEMA, num_bins=bins)

import pytest
from transformers import AutoConfig

from hf_vqlogits.gru_svm import GRUSVMConfig


def test_defaults_are_the_papers():
    config = GRUSVMConfig()
    assert (config.input_size, config.sequence_length, config.hidden_size) == (1, 21, 256)
    assert (config.dropout, config.svm_c) == (0.15, 0.5)
    assert (config.output_loss, config.num_labels) == ("squared_hinge", 2)


@pytest.mark.parametrize(
    ("output_loss", "classes", "scores"),
    [
        ("squared_hinge", 2, 1),
        ("squared_hinge", 3, 3),
        ("cross_entropy", 2, 2),
        ("cross_entropy", 5, 5),
    ],
)
def test_width_of_the_output_layer(output_loss, classes, scores):
    assert GRUSVMConfig(output_loss=output_loss, num_labels=classes).num_scores == scores


def test_survives_saving(tmp_path):
    names = {0: "normal", 1: "dos", 2: "probe"}
    config = GRUSVMConfig(
        sequence_length=None,
        input_size=4,
        hidden_size=8,
        dropout=0,
        svm_c=2,
        output_loss="cross_entropy",
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GRUSVMConfig
    assert loaded.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert (loaded.id2label, loaded.num_labels) == (names, 3)
    for field in ("sequence_length", "input_size", "hidden_size", "dropout", "svm_c"):
        assert getattr(loaded, field) == getattr(config, field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 0}, "`input_size` must be at least 1, got 0"),
        ({"sequence_length": 0}, "`sequence_length` must be at least 1, got 0"),
        ({"hidden_size": -3}, "`hidden_size` must be at least 1, got -3"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0.*share dropped"),
        ({"dropout": -0.1}, "`dropout` must be at least 0"),
        ({"dropout": float("nan")}, "`dropout` must be at least 0.*got nan"),
        ({"output_loss": "hinge"}, "`output_loss` must be one of .*'squared_hinge'.*got 'hinge'"),
        ({"svm_c": 0}, "`svm_c` must be positive and finite, got 0"),
        ({"svm_c": float("inf")}, "`svm_c` must be positive and finite, got inf"),
        ({"initializer_range": 0}, "`initializer_range` must be positive"),
        ({"num_labels": 1}, "`num_labels` must be at least 2, got 1: with one class"),
        ({"id2label": {0: "a", 2: "b"}}, r"`id2label` must name the classes 0 to 1, .*\[0, 2\]"),
        ({"problem_type": "regression"}, "`problem_type` must be .*got 'regression'"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GRUSVMConfig(**fields)

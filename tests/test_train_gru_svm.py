"""The GRU-SVM example, on small records in which one column decides the class."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMA = {
    "columns": {"size": "continuous", "flag": "categorical", "id": "ignored", "kind": "label"},
    "classes": {"ok": "normal", "*": "attack"},
    "header": True,
}
QUICK = "--hidden-size 8 --batch-size 16 --epochs 3 --learning-rate 0.03 --dropout 0".split()


@pytest.fixture(scope="module")
def main():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("train_gru_svm").main
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def files(tmp_path):
    draw = random.Random(0)

    def write(name, count):
        lines = ["size,flag,id,kind"]
        for number in range(count):
            size = draw.random()
            lines.append(f"{size},{draw.choice('ab')},{number},{'ok' if size < 0.5 else 'dos'}")
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return {
        "train": write("train.csv", 160),
        "test": write("test.csv", 40),
        "schema": str(tmp_path / "schema.json"),
        "output": str(tmp_path / "model"),
    }


def options(files, *more):
    """The command line, of which later options win."""
    given = ["--train-data", files["train"], "--schema", files["schema"]]
    return [*given, "--output", files["output"], *QUICK, *more]


@pytest.mark.parametrize("output_loss", ["squared_hinge", "cross_entropy"])
def test_trains_and_saves(main, files, capsys, output_loss):
    assert main(options(files, "--test-data", files["test"], "--output-loss", output_loss)) == 0
    told = capsys.readouterr().out
    accuracy = float(told.split("accuracy: ")[1].split()[0])
    assert accuracy > 0.8
    model = AutoModelForSequenceClassification.from_pretrained(files["output"]).eval()
    extractor = AutoFeatureExtractor.from_pretrained(files["output"])
    assert model.config.id2label == {0: "normal", 1: "attack"}
    assert (model.config.output_loss, model.config.sequence_length) == (output_loss, 2)
    features = extractor(extractor.read(files["test"]), return_tensors="pt")
    found = model(**features).logits.argmax(-1)
    share = float((found == features["labels"]).double().mean())
    assert share == pytest.approx(accuracy, abs=1e-4)
    counts = torch.bincount(2 * features["labels"] + found, minlength=4).view(2, 2).tolist()
    lines = told.split("predicted as:\n")[1].splitlines()
    assert [line.split() for line in lines[1:3]] == [
        [name, *map(str, row)] for name, row in zip(("normal", "attack"), counts, strict=True)
    ]


def test_a_fifth_is_kept_out_without_test_records(main, files, capsys):
    assert main(options(files, "--epochs", "1")) == 0
    assert "of 32 records" in capsys.readouterr().out


def test_malformed_lines_are_listed_and_left_out(main, files, capsys):
    with open(files["train"], "a") as file:
        file.write("huge,a,3,ok\n")
    assert main(options(files)) == 2
    told = capsys.readouterr().err
    assert "line 162: column 'size' must hold a finite number, found 'huge'" in told
    assert "--leave-out-malformed" in told
    assert "malformed=" not in told
    assert main(options(files, "--leave-out-malformed", "--epochs", "1")) == 0
    told = capsys.readouterr().err
    assert f"left out: {files['train']}: line 162: column 'size'" in told


MISTAKES = [
    ("--train-data absent.csv", "absent.csv cannot be read: No such file"),
    ("--test-data absent.csv", "absent.csv cannot be read: No such file"),
    ("--schema absent.json", "absent.json cannot be read: No such file"),
    ("--schema {train}", "train.csv' cannot be used: Expecting value"),
    ("--classes five", "`--classes` chooses the classes of NSL-KDD"),
    ("--epochs 0", "`--epochs` must be positive, got 0"),
    ("--epochs nan", "`--epochs` must be positive, got nan"),
    ("--learning-rate -1", "`--learning-rate` must be positive, got -1"),
    ("--batch-size 0", "`--batch-size` must be at least 1, got 0"),
    ("--gradient-accumulation-steps 0", "`--gradient-accumulation-steps` must be at least 1"),
    ("--seed -1", "`--seed` must lie between 0"),
    ("--hidden-size 0", "`hidden_size` must be at least 1, got 0"),
    ("--dropout 1", "`dropout` must be at least 0 and below 1"),
    ("--svm-c 0", "`svm_c` must be positive"),
    ("--num-bins 1", "`num_bins` must be an integer of at least 2"),
    ("--output {folder}", "exists; choose another"),
    ("--output {folder} --overwrite", "is not the output of an earlier"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(main, files, tmp_path, capsys, words, message):
    before = sorted(tmp_path.iterdir())
    words = words.format(train=files["train"], folder=tmp_path).split()
    assert main(options(files, *words)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_training_data_that_teach_nothing(main, files, tmp_path, capsys):
    one = tmp_path / "one.csv"
    one.write_text("size,flag,id,kind\n1,a,1,ok\n2,b,2,ok\n")
    assert main(options(files, "--train-data", str(one), "--test-data", files["test"])) == 2
    assert "All 2 training records are of the class 'normal'" in capsys.readouterr().err
    assert main(options(files, "--train-data", str(one))) == 2
    assert "2 records are too few to keep a fifth out" in capsys.readouterr().err


def test_words_that_are_no_numbers(main, files, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options(files, "--epochs", "many"))
    assert ended.value.code == 2
    assert "--epochs: invalid float value: 'many'" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_beside_the_model(main, files):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(options(files, "--onnx", "--epochs", "1")) == 0
    folder = Path(files["output"])
    run = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor(extractor.read(files["test"]), return_tensors="pt")
    (logits,) = run.run(["logits"], {"input_values": features["input_values"].numpy()})
    wanted = AutoModelForSequenceClassification.from_pretrained(folder)(**features).logits
    torch.testing.assert_close(torch.from_numpy(logits), wanted.detach(), atol=1e-5, rtol=1e-4)

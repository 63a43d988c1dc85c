import json
import os

import pytest

from hf_vqlogits.conversion import cli, convert
from hf_vqlogits.conversion.cli import main, parser


def run(tmp_path, monkeypatch, *argv):
    monkeypatch.chdir(tmp_path)
    return main([str(argument) for argument in argv])


def test_default_output_is_the_models_name(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    code = run(
        tmp_path, monkeypatch, "--model", tiny_folder, "--calibration-data", text_file, "--bits", 16
    )
    assert code == 0
    assert os.listdir(tmp_path) == ["tiny-vq"]
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "16 bits a token" in printed


def test_json_is_the_report_and_nothing_else(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    options = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 16, "--json")
    assert run(tmp_path, monkeypatch, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits_per_token"] == 16
    assert report == json.loads((tmp_path / "tiny-vq" / "vq_report.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 16, "--param-reduction", 0.9), "both choose the size"),
        (("--param-reduction", 1.5), "between 0 and 1"),
        (("--method", "kmeans", "--codebook-size", 4000), "larger than the vocabulary 400"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options, message, tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    base = ("--model", tiny_folder, "--calibration-data", text_file)
    assert run(tmp_path, monkeypatch, *base, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("convert_to_vq: error: ")
    assert message in error
    assert os.listdir(tmp_path) == []


def test_unknown_model(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--model", "no/such-model") == 2
    assert "'no/such-model' cannot be loaded" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_unknown_method_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "gpt2", "--method", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_existing_output(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    assert run(tmp_path, monkeypatch, *base) == 0
    before = (tmp_path / "tiny-vq" / "config.json").stat().st_mtime_ns
    assert run(tmp_path, monkeypatch, *base) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "tiny-vq" / "config.json").stat().st_mtime_ns == before
    assert run(tmp_path, monkeypatch, *base, "--overwrite") == 0


def test_interrupt_while_writing_leaves_nothing(
    tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "plot", interrupted)
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    assert run(tmp_path, monkeypatch, *base) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_option_names_are_the_keywords_of_the_call():
    import inspect

    options = set(vars(parser().parse_args(["--model", "x"])))
    keywords = set(inspect.signature(cli.convert_to_vq).parameters)
    assert options - {"model", "json"} == keywords - {"model_or_path", "tokenizer", "progress"}

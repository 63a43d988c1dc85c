import json
import os
import shutil

import pytest
import torch

from hf_vqlogits.conversion import cli, convert
from hf_vqlogits.conversion.cli import main, parser
from hf_vqlogits.conversion.errors import ConversionError


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
    assert "sign, R = 16, a second code for 40" in printed


@pytest.mark.parametrize(
    ("model", "name"), [(".", "inner-vq"), ("..", "outer-vq"), ("some/name/", "name-vq")]
)
def test_default_output_has_a_name(model, name, tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    asked = {}

    def refuse(model, **options):
        asked.update(options)
        raise ConversionError("enough")

    monkeypatch.setattr(cli, "convert_to_vq", refuse)
    assert run(tmp_path / "outer" / "inner", monkeypatch, "--model", model) == 2
    assert asked["output"] == name


def test_the_models_own_folder_as_working_folder(tiny_folder, text_file, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    options = ("--model", ".", "--calibration-data", text_file, "--bits", 8)
    assert run(folder, monkeypatch, *options) == 0
    assert (folder / "copy-vq" / "config.json").exists()


def test_json_is_the_report_and_nothing_else(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    options = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 16, "--json")
    assert run(tmp_path, monkeypatch, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_codebooks"] == 16
    assert report == json.loads((tmp_path / "tiny-vq" / "vq_report.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 16, "--param-reduction", 0.9), "both choose the size"),
        (("--param-reduction", 1.5), "between 0 and 1"),
        (("--nested", "0.9,0.8", "--bits", 9), "`nested` and `bits` both choose the size"),
        (("--nested", "0.9,0.8", "--max-perplexity-increase", 1), "`max_perplexity_increase` both"),
        (("--nested", "0.9,0.99999"), "`nested` holds 0.99999, but: `param_reduction` 0.99999"),
        (("--method", "kmeans", "--codebook-size", 4000), "larger than the vocabulary 400"),
        (("--bits-per-weight", "nan"), "`bits_per_weight` must lie above 0 and be at most 32"),
        (("--bits-per-weight", "inf"), "`bits_per_weight` must lie above 0 and be at most 32"),
        (("--bits-per-weight", "1e300"), "`bits_per_weight` must lie above 0 and be at most 32"),
        (("--bits", 10**12), "`bits` 1000000000000 makes codes of more than 32 bits a weight"),
        (("--max-perplexity-increase", 2), "0 and be at most 1, got 2.0; 0.02 allows 2% more"),
        (("--max-perplexity-increase", 0.1, "--bits", 8), "and `bits` 8 as well; give one of them"),
        (("--device", "foo"), "`device` 'foo' cannot be used"),
        (("--dtype", "float8_e4m3fn"), "`dtype` 'float8_e4m3fn' is no type that a model can be"),
        (("--seed", 5_000_000_000), "`seed` must be at most 2147483647, got 5000000000"),
        (("--seed", -1), "`seed` must be at least 0, got -1"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny_folder, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--model", tiny_folder, "--device", "cuda") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_to_vq: error: `device` 'cuda' cannot be used: Torch not ")


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", 0),
        ("--bits-per-weight", "nan"),
        ("--param-reduction", 1),
        ("--nested", "0.99"),
        ("--nested", "0.99,1.5"),
        ("--nested", "0.99,0.98", "--max-perplexity-increase", 0.02),
        ("--max-perplexity-increase", "nan"),
        ("--bits", 5, "--param-reduction", 0.9),
        ("--bits", 5, "--method", "kmeans"),
        ("--seed", -1),
        ("--device", "foo"),
        ("--dtype", "int8"),
    ],
)
def test_what_is_wrong_in_itself_is_told_before_the_model_is_loaded(
    options, tmp_path, monkeypatch, capsys
):
    assert run(tmp_path, monkeypatch, "--model", tmp_path / "missing", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`{options[0][2:].replace('-', '_')}`" in line
    assert "cannot be loaded" not in line


def test_unknown_model(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--model", "no/such-model") == 2
    assert "'no/such-model' cannot be loaded" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "gpt2", "--method", "magic"), "invalid choice: 'magic'"),
        (("--model", "gpt2", "--bits", "abc"), "argument --bits: invalid int value: 'abc'"),
        (("--model", "gpt2", "--nested", "0.99;0.98"), "as in 0.99,0.98; got '0.99;0.98'"),
        (("--bits", "8"), "the following arguments are required: --model"),
        (("--model", "gpt2", "--magic"), "unrecognized arguments: --magic"),
    ],
)
def test_what_the_parser_refuses_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main([*options])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_to_vq: error: ")
    assert message in line
    assert line.endswith("; see `convert_to_vq --help`.")


def test_an_error_of_several_lines_is_told_in_one(tmp_path, monkeypatch, capsys):
    def refuse(model, **options):
        raise ConversionError("one\n  two\n")

    monkeypatch.setattr(cli, "convert_to_vq", refuse)
    assert run(tmp_path, monkeypatch, "--model", "x") == 2
    assert capsys.readouterr().err == "convert_to_vq: error: one two\n"


def test_existing_output(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    assert run(tmp_path, monkeypatch, *base) == 0
    before = (tmp_path / "tiny-vq" / "config.json").stat().st_mtime_ns
    assert run(tmp_path, monkeypatch, *base) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "tiny-vq" / "config.json").stat().st_mtime_ns == before
    assert run(tmp_path, monkeypatch, *base, "--overwrite") == 0


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_interrupt_while_writing_leaves_nothing(
    tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "plot", interrupted)
        assert run(tmp_path, monkeypatch, *base) == 130
        error = capsys.readouterr().err
        assert error.splitlines()[-1] == "convert_to_vq: interrupted; nothing was written"
        assert os.listdir(tmp_path) == []
    assert run(tmp_path, monkeypatch, *base) == 0
    before = (tmp_path / "tiny-vq").stat()
    monkeypatch.setattr(convert, "plot", interrupted)
    assert run(tmp_path, monkeypatch, *base, "--overwrite") == 130
    assert "nothing was written, the earlier output is as it was" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tiny-vq"]
    assert (tmp_path / "tiny-vq").stat() == before


@pytest.mark.parametrize("earlier", [False, True])
def test_interrupt_after_writing_tells_that_the_output_is_there(
    earlier, tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    if earlier:
        assert run(tmp_path, monkeypatch, *base) == 0
    monkeypatch.setattr(convert, "_push", interrupted)
    options = ("--overwrite", "--push-to-hub", "someone/tiny-vq")
    assert run(tmp_path, monkeypatch, *base, *options) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("the output 'tiny-vq' was already written, and is complete")
    assert os.listdir(tmp_path) == ["tiny-vq"]


def test_interrupt_between_the_renames_puts_the_earlier_output_back(
    tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--bits", 8)
    assert run(tmp_path, monkeypatch, *base) == 0
    before, replace = (tmp_path / "tiny-vq").stat(), os.replace

    def only_of_the_output(source, target):
        if str(source).endswith("new"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_of_the_output)
    assert run(tmp_path, monkeypatch, *base, "--overwrite") == 130
    assert "the earlier output is as it was" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tiny-vq"]
    assert (tmp_path / "tiny-vq").stat().st_ino == before.st_ino
    assert (tmp_path / "tiny-vq" / "model.safetensors").exists()


def test_outputs_that_cannot_be_are_told_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nothing")
    for output, message in (("file/out", "which is no folder"), ("link", "where nothing is")):
        assert run(tmp_path, monkeypatch, "--model", "no/such", "--output", output) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_overwriting_through_a_link(tiny_folder, text_file, tmp_path, monkeypatch):
    base = ("--model", tiny_folder, "--calibration-data", text_file, "--output", "link")
    assert run(tmp_path, monkeypatch, *base[:-1], "real", "--bits", 8) == 0
    (tmp_path / "link").symlink_to("real")
    assert run(tmp_path, monkeypatch, *base, "--bits", 16, "--overwrite") == 0
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "vq_report.json").read_text())["num_codebooks"] == 16


def test_option_names_are_the_keywords_of_the_call():
    import inspect

    options = set(vars(parser().parse_args(["--model", "x"])))
    keywords = set(inspect.signature(cli.convert_to_vq).parameters)
    assert options - {"model", "json"} == keywords - {"model_or_path", "tokenizer", "progress"}

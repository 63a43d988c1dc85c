"""The fine-tuning examples, on a small random model with a tokenizer of 62 words."""

import gzip
import importlib
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsHead

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("finetune_trainer", "finetune_accelerate")
CONTEXT = 16
QUICK = "--context 16 --steps 40 --batch-size 4 --learning-rate 0.03".split()
HEAD = {"lm_head.codebook", "lm_head.codebook_bias"}

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def write_inputs(folder: Path) -> None:
    """A model `vq`, its dense twin `dense`, and `text.txt`, in which each word decides the next."""
    words = [f"w{i}" for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, unk_token="<unk>", bos_token="</s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    draw = random.Random(0)
    lines = []
    for _ in range(150):
        word, line = draw.randrange(60), []
        for _ in range(12):
            line.append(words[word])
            word = (7 * word + draw.randrange(2)) % 60
        lines.append(" ".join(line) + "\n")
    (folder / "text.txt").write_text("".join(lines), encoding="utf8")
    torch.manual_seed(0)
    text_config = GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    quantised = VQLogitsForCausalLM(VQLogitsConfig(text_config=text_config, num_codebooks=40))
    for name, model in (("vq", quantised), ("dense", GPT2LMHeadModel(text_config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products on many threads take a hundred times as long when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SCRIPTS)
def example(request, monkeypatch, capsys):
    """Runs an example in this process; returns exit code, output and errors."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(request.param)

    def run(*words):
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        try:
            code = module.main([str(word) for word in words])
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def perplexities(out: str) -> tuple[float, float]:
    found = dict(re.findall(r"(before|after): perplexity ([\d.]+)", out))
    return float(found["before"]), float(found["after"])


@torch.no_grad()
def reference_perplexity(folder: Path, text: str) -> float:
    """Of the last fifth of the lines, from all logits, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = text.splitlines(keepends=True)
    held_out = "".join(lines[int(len(lines) * 0.8) :])
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(held_out).input_ids)
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    logs = model(input_ids=rows).logits.double().log_softmax(-1)[:, :-1]
    return logs.gather(-1, rows[:, 1:, None]).mean().neg().exp().item()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {
        k: (v.shape, v.dtype) for k, v in new.items()
    }
    return {k for k in old if not torch.equal(old[k], new[k])}


def test_a_model_of_margins_is_told_by_its_loss(example, inputs, tmp_path):
    model, output = tmp_path / "margins", tmp_path / "tuned"
    shutil.copytree(inputs / "vq", model)
    config = VQLogitsConfig.from_pretrained(model)
    config.output_loss = "squared_hinge"
    config.save_pretrained(model)
    code, out, _ = example(
        *("--model", model, "--train-data", inputs / "text.txt", "--output", output), *QUICK
    )
    assert code == 0
    assert "perplexity" not in out
    before, after = (float(loss) for loss in re.findall(r"(?:before|after): loss ([\d.]+)", out))
    assert after < before
    assert VQLogitsConfig.from_pretrained(output).output_loss == "squared_hinge"


def test_a_perplexity_beyond_float64_is_told(inputs, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    finetuning = importlib.import_module("finetuning")
    task = finetuning.Task(AutoModelForCausalLM.from_pretrained(inputs / "vq"), *[None] * 5)
    assert finetuning.describe_loss(1000.0, task) == "perplexity inf"
    assert finetuning.describe_loss(0.0, task) == "perplexity 1.0000"


@pytest.mark.parametrize("what", ["head", "all", "lora"])
def test_perplexity_falls_and_the_output_loads(example, inputs, tmp_path, what):
    model, output, text = inputs / "vq", tmp_path / "tuned", inputs / "text.txt"
    code, out, _ = example(
        *("--model", model, "--train-data", text, "--output", output, "--train", what), *QUICK
    )
    assert code == 0
    before, after = perplexities(out)
    assert after < 0.8 * before
    assert before == pytest.approx(reference_perplexity(model, text.read_text()), rel=1e-4)
    assert after == pytest.approx(reference_perplexity(output, text.read_text()), rel=1e-4)
    assert AutoTokenizer.from_pretrained(output).chat_template is not None
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]
    if what == "head":
        assert changed(model, output) == HEAD
    elif what == "all":
        buffers = {"lm_head.codes", "lm_head.hidden_mean", "lm_head.fold_direction"}
        assert changed(model, output) == set(tensors(model)) - buffers
    else:
        stored = load_file(output / "adapter_model.safetensors")
        base = tensors(model)
        assert {k.split(".")[-2] for k in stored if "lora_" in k} == {"lora_A", "lora_B"}
        for name in HEAD:
            assert not torch.equal(stored[f"base_model.model.{name}"], base[name])
        assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["head", "all", "lora"])
def test_codes_are_learnt_on_request(example, inputs, tmp_path, what):
    model, output, text = inputs / "vq", tmp_path / "tuned", inputs / "text.txt"
    words = ("--model", model, "--train-data", text, "--output", output, "--train", what)
    code, out, _ = example(
        *words, *("--learn-codes", 20, "--gradient-accumulation-steps", 2), *QUICK
    )
    assert code == 0
    moves = re.findall(r"step (\d+) of 40: moved (\d+|no) .* ([\d.]+) -> ([\d.]+)", out)
    assert [int(move[0]) for move in moves] == [20, 40]
    assert any(float(after) < float(before) for *_, before, after in moves)
    before, after = perplexities(out)
    assert after < 0.8 * before
    if what == "lora":
        stored = load_file(output / "adapter_model.safetensors")
        codes = stored["base_model.model.lm_head.codes"]
        assert not torch.equal(codes, tensors(model)["lm_head.codes"])
        return
    assert "lm_head.codes" in changed(model, output)
    assert after == pytest.approx(reference_perplexity(output, text.read_text()), rel=1e-4)


def test_merged_adapter_is_a_plain_model(example, inputs, tmp_path):
    output, text = tmp_path / "merged", inputs / "text.txt"
    code, out, _ = example(
        *("--model", inputs / "vq", "--train-data", text, "--output", output),
        *("--train", "lora", "--merge-adapter", "--lora-rank", "2"),
        *QUICK,
    )
    assert code == 0
    attention = {f"model.backbone.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    assert changed(inputs / "vq", output) == HEAD | attention
    expected = reference_perplexity(output, text.read_text())
    assert perplexities(out)[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("what", ["head", "all", "lora"])
def test_dense_model_for_comparison(example, inputs, tmp_path, what):
    output, text = tmp_path / "tuned", inputs / "text.txt"
    words = ("--model", inputs / "dense", "--train-data", text, "--output", output)
    code, out, _ = example(*words, "--train", what, *QUICK)
    assert code == 0
    before, after = perplexities(out)
    assert after < before
    assert after == pytest.approx(reference_perplexity(output, text.read_text()), rel=1e-4)
    if what == "head":  # tied: the output layer is the input embedding
        assert changed(inputs / "dense", output) == {"transformer.wte.weight"}


def test_never_computes_logits(example, inputs, tmp_path, monkeypatch):
    """Neither in training nor in evaluation: the head gives losses alone."""
    forward = VQLogitsHead.forward

    def watched(self, hidden_states, labels=None, **kwargs):
        assert labels is not None
        return forward(self, hidden_states, labels, **kwargs)

    monkeypatch.setattr(VQLogitsHead, "forward", watched)
    words = ("--model", inputs / "vq", "--train-data", inputs / "text.txt")
    code, out, _ = example(
        *words, "--output", tmp_path / "tuned", *QUICK, "--steps", "4", "--eval-steps", "2"
    )
    assert code == 0
    assert perplexities(out)[0] > 1


def test_evaluation_text_of_its_own(example, inputs, tmp_path):
    """Read from a .gz file; trained on all of the other text."""
    lines = (inputs / "text.txt").read_text().splitlines(keepends=True)
    first = tmp_path / "first.txt"
    first.write_text("".join(lines[:120]))
    with gzip.open(tmp_path / "last.txt.gz", "wt") as file:
        file.writelines(lines[120:])
    words = ("--model", inputs / "vq", "--output", tmp_path / "tuned", *QUICK, "--steps", "4")
    code, out, _ = example(*words, "--train-data", first, "--eval-data", tmp_path / "last.txt.gz")
    assert code == 0
    expected = reference_perplexity(inputs / "vq", "".join(lines))
    assert perplexities(out)[0] == pytest.approx(expected, rel=1e-4)


def test_output_can_be_trained_further_and_replaced(example, inputs, tmp_path):
    words = ("--train-data", inputs / "text.txt", *QUICK)
    first, second = tmp_path / "first", tmp_path / "second"
    code, out, _ = example("--model", inputs / "vq", "--output", first, *words)
    assert code == 0
    after_first = perplexities(out)[1]
    code, out, _ = example("--model", first, "--output", second, *words)
    assert code == 0
    before, after = perplexities(out)
    assert before == pytest.approx(after_first, rel=1e-4)
    assert after < before

    code, _, err = example("--model", inputs / "vq", "--output", second, *words)
    assert code == 2
    assert "exists" in err
    stored = (second / "model.safetensors").read_bytes()
    words = (*words, "--train", "head", "--overwrite")
    code, _, _ = example("--model", inputs / "vq", "--output", second, *words)
    assert code == 0
    assert (second / "model.safetensors").read_bytes() != stored
    assert changed(inputs / "vq", second) == HEAD


def test_rows_begin_with_what_the_tokenizer_puts_in_front(example, inputs, tmp_path):
    """A token such as Gemma's <bos> begins every row, and every word counts but it does not."""
    begun, text = tmp_path / "begun", (inputs / "text.txt").read_text(encoding="utf8")
    model = AutoModelForCausalLM.from_pretrained(inputs / "vq")
    model.lm_head.codebook.data *= 30  # or it predicts much the same whatever it reads
    model.save_pretrained(begun)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "vq")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    tokenizer.save_pretrained(begun)
    code, out, _ = example(
        *("--model", begun, "--train-data", inputs / "text.txt", "--output", tmp_path / "tuned"),
        *("--train", "head", *QUICK[:2], "--steps", "1"),
    )
    assert code == 0
    lines = text.splitlines(keepends=True)
    ids = tokenizer("".join(lines[120:]), add_special_tokens=False, return_tensors="pt").input_ids[
        0
    ]
    rows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    rows = torch.cat([torch.ones(len(rows), 1, dtype=torch.long), rows], 1)
    with torch.no_grad():
        logs = model.eval()(input_ids=rows).logits.double().log_softmax(-1)[:, :-1]
    wanted = logs.gather(-1, rows[:, 1:, None]).mean().neg().exp().item()
    assert perplexities(out)[0] == pytest.approx(wanted, rel=2e-3)


def test_type_of_the_weights_is_kept(example, inputs, tmp_path):
    """Trained in float32 (autocast to bfloat16), stored as it was."""
    low = tmp_path / "low"
    model = AutoModelForCausalLM.from_pretrained(inputs / "vq", dtype=torch.bfloat16)
    model.save_pretrained(low)
    AutoTokenizer.from_pretrained(inputs / "vq").save_pretrained(low)
    output = tmp_path / "tuned"
    code, out, _ = example(
        *("--model", low, "--train-data", inputs / "text.txt", "--output", output),
        *("--train", "head", "--mixed-precision", "bf16", *QUICK),
    )
    assert code == 0
    before, after = perplexities(out)
    assert after < 0.8 * before
    assert changed(low, output) == HEAD
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


BAD = {
    "no such model": (["--model", "./missing"], "there is no such folder"),
    "no such text": (["--train-data", "missing.txt"], "There is no file or folder"),
    "own folder": (["--output", "{vq}"], "own folder"),
    "foreign folder": (["--output", "{foreign}", "--overwrite"], "not the output of"),
    "too little text": (
        ["--batch-size", "100", "--gradient-accumulation-steps", "3"],
        r"has 1,440 tokens, but .* needs 4,800 \(300 rows of 16\)",
    ),
    "too little to evaluate": (["--eval-data", "{short}"], "has 1 tokens, but evaluation needs 16"),
    "context": (["--context", "33"], "above the 32 positions"),
    "adapter": (["--model", "{adapter}"], "PEFT adapter"),
    "no steps": (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
    "no number": (["--learning-rate", "nan"], "argument --learning-rate: must be a positive"),
    "no codes": (["--model", "{dense}", "--learn-codes", "2"], "has no `VQLogitsHead`"),
    "codes never moved": (["--learn-codes", "41"], "--learn-codes 41 is above --steps 40"),
    "nothing to merge": (["--train", "all", "--merge-adapter"], "needs --train lora"),
}


def test_overwrite_never_deletes_the_model_inside_the_output(example, inputs, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(inputs / "vq", output)
    shutil.copytree(inputs / "vq", output / "checkpoint-500")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = example(
        *("--model", output / "checkpoint-500", "--train-data", inputs / "text.txt"),
        *("--output", output, "--overwrite", *QUICK, "--steps", "1"),
    )
    assert code == 2
    assert "the source model's own folder, or holds it" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(example, inputs, tmp_path, case):
    foreign, adapter, short = (tmp_path / n for n in ("foreign", "adapter", "short.txt"))
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    short.write_text("w1")
    before = sorted(tmp_path.rglob("*"))
    words, message = BAD[case]
    places = {
        "vq": inputs / "vq",
        "dense": inputs / "dense",
        "foreign": foreign,
        "adapter": adapter,
        "short": short,
    }
    code, _, err = example(
        *("--model", inputs / "vq", "--train-data", inputs / "text.txt"),
        *("--output", tmp_path / "tuned", *QUICK),
        *(word.format(**places) for word in words),
    )
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "error: " in last
    assert re.search(message, last)
    assert sorted(tmp_path.rglob("*")) == before


def test_fp16_without_gpu_is_refused(example, inputs, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    words = ("--model", inputs / "vq", "--train-data", inputs / "text.txt", "--output", tmp_path)
    code, _, err = example(*words, "--mixed-precision", "fp16")
    assert code == 2
    assert "needs a GPU" in err


def test_tokenizer_of_another_model_is_refused(example, inputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(inputs / "vq")
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(inputs / "vq").save_pretrained(tmp_path / "small")
    words = ("--model", tmp_path / "small", "--train-data", inputs / "text.txt")
    code, _, err = example(*words, "--output", tmp_path / "tuned", *QUICK)
    assert code == 2
    assert "vocabulary of 40: they do not belong together" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_command(script, inputs, tmp_path):
    """From another folder, as users run it: no traceback, exit code 2."""
    command = [sys.executable, EXAMPLES / f"{script}.py", "--model", inputs / "vq"]
    command += ["--train-data", "missing.txt", "--output", "tuned"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: There is no file or folder 'missing.txt'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

import torch
from transformers import AutoModelForCausalLM

from benchmarks import finetuning
from benchmarks.finetuning import perplexities, prepare


class Words:
    """As much of a tokenizer as is asked for."""

    def __len__(self):
        return 300

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")

    def batch_decode(self, rows):
        return [" ".join(map(str, row.tolist())) for row in rows]


def test_both_models_and_the_text_are_written(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "DISTILL_STEPS", 2)
    tiny_case.tokenizer = Words()
    folders = prepare(tiny_case, tmp_path, reduction=0.9, calibration_tokens=10_000, seed=0)
    models = {n: AutoModelForCausalLM.from_pretrained(f) for n, f in folders.items()}
    assert type(models["dense"]).__name__ == "GPT2LMHeadModel"
    assert models["vq"].lm_head.num_codebooks == int(0.1 * 300 * 32 / 33)
    lines = (tmp_path / "train.txt").read_text().split("\n")
    assert lines == Words().batch_decode(tiny_case.calibration[:, :-1])
    wanted = tiny_case.parts.logits(
        tiny_case.parts.backbone(tiny_case.evaluation["novels"][:, :-1]).last_hidden_state
    )
    labels = tiny_case.evaluation["novels"][:, 1:]
    nats = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten())
    found = perplexities(folders["dense"], tiny_case, 10_000)["novels"]
    assert abs(found / float(nats.exp()) - 1) < 1e-4

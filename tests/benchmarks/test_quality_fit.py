"""The whole benchmark on a tiny random model."""

import json
import math
import sys

import pytest
import torch

from benchmarks import quality_fit
from benchmarks.models import fit_head
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import choose_size


@torch.no_grad()
def perplexity_of(case, head):
    ids = case.evaluation["novels"]
    hidden = case.parts.backbone(ids[:, :-1]).last_hidden_state.flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(head(hidden).double(), ids[:, 1:].flatten())
    return math.exp(nats)


def test_every_head_is_measured_by_the_fit_alone_and_sign_codes_distilled(
    tiny_case, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quality_fit, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(quality_fit, "ROWS", (("signs", 0.9), ("kmeans", 0.9)))
    output = tmp_path / "new" / "quality_fit.json"
    words = ["--only", "gpt2-novels", "--distill-steps", "20", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["quality_fit", *words])
    quality_fit.main()

    result = json.loads(output.read_text())
    rows = {row["head"]: row for row in result["rows"]}
    assert list(rows) == ["signs 90.0%", "signs 90.0% distilled", "kmeans 90.0%"]
    dense = perplexity_of(tiny_case, tiny_case.parts.logits)
    for row in rows.values():
        text = row["texts"]["novels"]
        assert text["dense_perplexity"] == pytest.approx(dense, rel=1e-3)
        assert row["factor"] == pytest.approx(text["perplexity"] / text["dense_perplexity"])
        assert 0 <= text["greedy_agreement"] <= 1
        assert row["seconds"] > 0
        assert row["dense_bytes_bfloat16"] == 2 * 300 * 32
        assert row["calibration_tokens"] == tiny_case.calibration.numel()
    assert rows["signs 90.0%"]["num_codebooks"] == int(0.1 * 300 * 32 / 33)
    assert rows["kmeans 90.0%"]["num_codebooks"] == 1
    told = rows["signs 90.0% distilled"]["distillation"]
    assert told["kl_after"] < told["kl_before"]
    assert rows["signs 90.0%"]["distillation"] is rows["kmeans 90.0%"]["distillation"] is None

    # The fit alone is untouched by the distillation of its copy.
    quantiser = Quantiser(tiny_case.parts, tiny_case.corpus(), 0)
    statistics = quantiser.calibrate(to_distill=True)
    size = choose_size("signs", vocab_size=300, hidden_size=32, param_reduction=0.9)
    head = fit_head(quantiser, "signs", size, statistics)
    found = rows["signs 90.0%"]["texts"]["novels"]["perplexity"]
    assert found == pytest.approx(perplexity_of(tiny_case, head), rel=1e-2)
    distilled = rows["signs 90.0% distilled"]["texts"]["novels"]["perplexity"]
    assert found != pytest.approx(distilled, rel=1e-4)
    assert "signs 90.0% distilled" in capsys.readouterr().out

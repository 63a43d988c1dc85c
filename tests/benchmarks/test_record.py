import json
import math
import sys

import pytest
import torch

from benchmarks.record import record, score_of, write
from hf_vqlogits.conversion.comparison import HeadScore


def test_a_result_says_how_to_make_it_again(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["speed.py", "--quick", "--peers", "low rank", "--output", "x.json"]
    )
    result = record("speed", "pytest", rows=[1])
    assert (
        result["command"] == "python -m benchmarks.speed --quick --peers 'low rank' --output x.json"
    )
    assert result["rows"] == [1]
    assert result["versions"]["pytest"] == pytest.__version__
    assert result["machine"]["cores"] >= 1
    write(result, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == result
    write({"kl": [0.5, math.nan]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"kl": [0.5, None]}
    monkeypatch.setattr(
        sys, "argv", ["speed.py", "--work", "some/where/work", "--output", "x.json"]
    )
    command = record("speed")["command"]
    assert command == "python -m benchmarks.speed --work WORK --output x.json"
    assert "some/where/work" in sys.argv


def test_a_score_is_the_geometric_mean_of_the_texts():
    def score(nats):
        return HeadScore(nats, 0.5, 7, torch.zeros(7))

    scores = {
        "one": {"dense": score(3.0), "head": score(3.2)},
        "two": {"dense": score(2.0), "head": score(2.4)},
    }
    found = score_of(scores, "head")
    assert found["factor"] == pytest.approx(math.exp(0.3))
    assert found["texts"]["one"] == {
        "dense_perplexity": pytest.approx(math.exp(3.0)),
        "perplexity": pytest.approx(math.exp(3.2)),
        "factor": pytest.approx(math.exp(0.2)),
        "greedy_agreement": 0.5,
        "tokens": 7,
    }

import pytest
import torch

from hf_vqlogits.conversion import convert_to_vq, corpus
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.coverage import (
    HIDDEN_LIMIT,
    UNSEEN_LIMIT,
    CoverageMeter,
    TextCoverage,
    warnings_of,
)

V, D = 30, 6


@pytest.fixture
def hidden():
    """With a mean and a covariance far from 0 and I."""
    return torch.randn(4_000, D) @ torch.randn(D, D) + 5 * torch.randn(D)


@pytest.fixture
def statistics(hidden):
    accumulator = StatisticsAccumulator(torch.randn(V, D))
    accumulator.update(hidden)
    return accumulator.finish()


@pytest.fixture
def meter(statistics):
    """Of a text whose labels are the even tokens below 20; the first column is no label."""
    blocks = 2 * torch.randint(10, (40, 101))
    blocks[:, 0] = 29
    return CoverageMeter(statistics, blocks)


def test_against_a_float64_reference(meter, statistics, hidden):
    other = 1.5 * torch.randn(500, D) @ torch.randn(D, D) + 2
    labels = torch.randint(V, (500,))
    batches = list(zip(other.split(200), labels.split(200), strict=True))
    found = meter.measure(batches, "other")["other"]
    centred = other.double() - hidden.double().mean(0)
    inverse = torch.linalg.inv(statistics.regularised_covariance())
    squares = torch.einsum("ni,ij,nj->n", centred, inverse, centred)
    assert found.hidden == pytest.approx(float(squares.mean()) / D, rel=1e-4)
    unseen = [label % 2 == 1 or label >= 20 for label in labels.tolist()]
    assert found.unseen == pytest.approx(sum(unseen) / 500)
    assert found.tokens == 500


def test_the_calibration_text_covers_itself(meter, hidden):
    labels = torch.zeros(len(hidden), dtype=torch.long)
    found = meter.measure([(hidden, labels)], "same")["same"]
    assert found.hidden == pytest.approx(1.0, abs=0.05)
    assert found.unseen == 0
    assert not found.bad


def test_hidden_states_are_passed_on(meter, hidden):
    batches = [(hidden[:5], torch.arange(5)), (hidden[5:9], torch.arange(4))]
    found = {}
    passed = meter.watch(batches, found, "text")
    assert next(passed)[0] is batches[0][0]
    assert found == {}
    assert [labels.tolist() for _, labels in passed] == [[0, 1, 2, 3]]
    assert found["text"].tokens == 9


def test_an_empty_text(meter):
    assert meter.measure([], "text") == {}


def test_likely_vocabulary():
    """Fisher weights are p (1 - p), summed: of two tokens of one half each a quarter a position."""
    weight = torch.full((V, D), -100.0)
    weight[:2] = 0.0
    accumulator = StatisticsAccumulator(weight)
    accumulator.update(torch.ones(5, D))
    meter = CoverageMeter(accumulator.finish(), torch.zeros(1, 3, dtype=torch.long))
    assert meter.likely_vocabulary == pytest.approx(2 / V)


@pytest.mark.parametrize(
    ("unseen", "hidden", "bad"),
    [
        (0.0, 1.0, False),
        (UNSEEN_LIMIT, HIDDEN_LIMIT, False),
        (UNSEEN_LIMIT + 0.01, 1.0, True),
        (0.0, HIDDEN_LIMIT + 0.01, True),
    ],
)
def test_limits(unseen, hidden, bad):
    found = TextCoverage(100, unseen, hidden)
    assert found.bad == bad
    for name in ("evaluation", "own_text"):
        assert len(warnings_of({name: found})) == bad


def test_a_warning_says_what_was_seen_and_what_to_do():
    good, bad = TextCoverage(100, 0.05, 1.1), TextCoverage(100, 0.4321, 3.21)
    [note] = warnings_of({"evaluation": good, "own_text": bad})
    assert "covers only a part of what the model writes by itself (43.2% of its tokens" in note
    assert "x3.21; like texts have up to 25% and x2)" in note
    assert "give --calibration-data such text, or `self`" in note
    [judged, own] = warnings_of({"evaluation": bad, "own_text": bad})
    assert "does not cover the evaluation text (43.2% of its tokens never occur" in judged
    assert "x3.21; like texts have up to 25% and x2): it is of another language" in judged
    assert "give --calibration-data more text, like what the model will read" in judged
    assert own == note


@pytest.fixture(scope="module")
def files(text, tmp_path_factory):
    """English, more of it, and the same in letters of another alphabet: no language, but tokens
    that English lacks.
    """
    folder = tmp_path_factory.mktemp("text")
    foreign = str.maketrans({chr(ord("a") + i): chr(ord("\u0430") + i) for i in range(26)})
    texts = {"english": text[:20_000], "more": text[20_000:30_000]}
    texts["foreign"] = texts["english"].lower().translate(foreign)
    for name, content in texts.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf8")
    return {name: folder / f"{name}.txt" for name in texts}


def test_another_language_is_warned_about(tiny_folder, files):
    options = {"bits": 8, "calibration_data": files["english"]}
    same = convert_to_vq(tiny_folder, eval_data=files["more"], **options)
    assert same.coverage["evaluation"].hidden == pytest.approx(1, abs=0.3)
    assert not any("does not cover the evaluation text" in note for note in same.notes)
    other = convert_to_vq(tiny_folder, eval_data=files["foreign"], **options)
    assert other.coverage["evaluation"].unseen > 0.5
    assert any("does not cover the evaluation text" in note for note in other.notes)


def test_held_out_text_of_the_same_language_cannot_tell(tiny_folder, files, monkeypatch):
    """What the model writes by itself can."""
    monkeypatch.setattr(corpus, "OWN_TOKENS", 500)
    monkeypatch.setattr(corpus, "OWN_CONTEXT", 64)
    report = convert_to_vq(tiny_folder, bits=8, calibration_data=files["foreign"])
    assert not report.coverage["evaluation"].bad
    assert report.coverage["own_text"].tokens == 512
    assert not any("does not cover" in note for note in report.notes)
    assert any("only a part of what the model writes by itself" in note for note in report.notes)


def test_text_that_the_model_wrote_is_not_compared_with_itself(tiny_folder):
    report = convert_to_vq(tiny_folder, bits=8, calibration_data="self", calibration_tokens=2_000)
    assert set(report.coverage) == {"evaluation"}

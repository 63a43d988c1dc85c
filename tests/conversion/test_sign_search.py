import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sign_problems import random_metric, random_signs

from hf_vqlogits.conversion import sign_codebook, sign_search
from hf_vqlogits.conversion.sign_search import SearchEffort, free_bits, search_signs

DESCENT = SearchEffort(flips=1000, tenure=0, patience=1000)
TABU = SearchEffort(flips=1000, tenure=5, patience=1000)


@pytest.fixture(params=["compiled", "torch"])
def variant(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(sign_search, "_library", lambda: None)
    elif sign_search._library() is None:
        pytest.skip("the compiled search was not built")
    return request.param


def errors(metric, signs, codebook):
    return metric.error(metric.rows - signs.float() @ codebook) / metric.weight


def in_quarters(values):
    return (4 * values).round() / 4


def neighbours(metric, signs, codebook):
    """Errors of all codes that differ in one bit, (V, R)."""
    out = torch.empty(signs.shape)
    for bit in range(signs.shape[1]):
        flipped = signs.clone()
        flipped[:, bit] *= -1
        out[:, bit] = errors(metric, flipped, codebook)
    return out


@pytest.mark.parametrize("bits", [1, 7, 16, 33])
def test_descent_ends_where_no_single_flip_helps(variant, monkeypatch, bits):
    monkeypatch.setattr(sign_codebook, "TILE", 17)
    metric, signs = random_metric(50, 9), random_signs(50, bits)
    codebook = torch.randn(bits, 9)
    before = errors(metric, signs, codebook)
    search_signs(metric, signs, codebook, effort=DESCENT)
    after = errors(metric, signs, codebook)
    assert (after <= before + 1e-4).all()
    assert (neighbours(metric, signs, codebook) >= after[:, None] - 1e-3).all()
    assert set(signs.unique().tolist()) == {-1, 1}


def test_tabu_search_finds_the_best_codes_of_small_problems(variant):
    bits = 10
    metric, signs = random_metric(40, 6), random_signs(40, bits)
    codebook = torch.randn(bits, 6)
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)))
    best = torch.full((40,), torch.inf)
    for code in every:
        best = torch.minimum(best, errors(metric, code.expand(40, -1), codebook))
    search_signs(metric, signs, codebook, effort=TABU)
    found = errors(metric, signs, codebook)
    # Descent alone finds it for a third of the tokens.
    assert (found <= 1.001 * best + 1e-4).float().mean() >= 0.8


def test_tabu_search_beats_descent(variant):
    metric = random_metric(200, 30)
    codebook = 0.3 * torch.randn(40, 30)
    totals = []
    for effort in (DESCENT, TABU):
        signs = random_signs(200, 40)
        search_signs(metric, signs, codebook, effort=effort)
        totals.append(errors(metric, signs, codebook).sum())
    assert totals[1] < 0.97 * totals[0]


def test_compiled_and_torch_descend_alike(monkeypatch):
    if sign_search._library() is None:
        pytest.skip("the compiled search was not built")
    metric, codebook = random_metric(100, 12), torch.randn(20, 12)
    results = []
    for library in (sign_search._library(), None):
        monkeypatch.setattr(sign_search, "_library", lambda library=library: library)
        signs = random_signs(100, 20)
        search_signs(metric, signs, codebook, effort=DESCENT)
        results.append(signs)
    # Rounding may decide between two flips of nearly equal gain.
    assert (results[0] == results[1]).all(1).float().mean() > 0.95


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 12),
    bits=st.integers(1, 40),
    size=st.integers(2, 8),
    flips=st.integers(0, 30),
    tenure=st.integers(0, 40),
    patience=st.integers(0, 10),
    seed=st.integers(0, 2**64 - 1),
    frozen=st.none() | st.integers(0, 40),
)
def test_search_never_makes_a_token_worse(
    tokens, bits, size, flips, tenure, patience, seed, frozen
):
    metric, signs = random_metric(tokens, size), random_signs(tokens, bits)
    codebook = torch.randn(bits, size, generator=torch.Generator().manual_seed(bits))
    before, codes = errors(metric, signs, codebook), signs.clone()
    effort = SearchEffort(flips=flips, tenure=tenure, patience=patience)
    free = None if frozen is None else torch.arange(min(frozen, bits - 1), bits)
    search_signs(metric, signs, codebook, effort=effort, seed=seed, free=free)
    if free is not None:
        assert torch.equal(signs[:, : free[0]], codes[:, : free[0]])
    assert (errors(metric, signs, codebook) <= before * (1 + 1e-4) + 1e-4).all()


def test_result_does_not_depend_on_the_threads(variant):
    # Quarters, whose products and sums are exact: a library of products may add up in an order that
    # depends on the threads, and one other last digit leads a search another way.
    metric, codebook = random_metric(300, 10), in_quarters(torch.randn(24, 10))
    metric = dataclasses.replace(
        metric, rows=in_quarters(metric.rows), context=in_quarters(metric.context)
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            signs = random_signs(300, 24)
            search_signs(metric, signs, codebook, effort=TABU, seed=5)
            results.append(signs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_free_bits_are_searched_as_if_alone_on_what_the_others_leave(variant):
    metric, signs, codebook = random_metric(60, 9), random_signs(60, 23), torch.randn(23, 9)
    free = torch.tensor([2, 3, 7, 11, 12, 20, 21, 22])
    others = torch.tensor([bit for bit in range(23) if bit not in free])
    rows = metric.rows.double() - signs[:, others].double() @ codebook[others].double()
    alone = dataclasses.replace(metric, rows=rows.float())
    wanted = signs[:, free].contiguous()
    search_signs(alone, wanted, codebook[free], effort=TABU, seed=3)
    before = signs.clone()
    search_signs(metric, signs, codebook, effort=TABU, seed=3, free=free)
    assert torch.equal(signs[:, others], before[:, others])
    # Rounding may decide between two flips of nearly equal gain.
    assert (signs[:, free] == wanted).all(1).float().mean() > 0.95
    assert not torch.equal(wanted, before[:, free])


@pytest.mark.parametrize(
    ("frozen", "widths", "free"),
    [(0, (3,), None), (2, (5,), [2, 3, 4]), (2, (4, 4), [2, 3, 6, 7]), (2, (4, 2), [2, 3])],
)
def test_bits_that_are_free(frozen, widths, free):
    found = free_bits(frozen, *widths)
    assert (None if found is None else found.tolist()) == free


def test_zero_codebook_changes_nothing(variant):
    metric, signs = random_metric(20, 5), random_signs(20, 9)
    before = signs.clone()
    search_signs(metric, signs, torch.zeros(9, 5), effort=TABU)
    assert torch.equal(signs, before)


def test_a_library_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(sign_search, "__file__", str(tmp_path / "sign_search.py"))
    (tmp_path / ("_sign_search" + sign_search.EXTENSION_SUFFIXES[0])).write_bytes(b"no library")
    assert sign_search._library.__wrapped__() is None
    assert "cannot be used" in caplog.text
    assert "built without a C++ compiler" in caplog.text

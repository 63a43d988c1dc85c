import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, top

PATHS = cpu.paths()
each_backend = pytest.mark.parametrize("backend", ["eager", *PATHS])
D = 24


def problem(rows, vocabulary, num_codebooks=60, second=0):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    return {
        "hidden": torch.randn(rows, D, generator=generator),
        "codebook": torch.randn(num_codebooks, D, generator=generator),
        "codebook_bias": torch.randn(num_codebooks, generator=generator),
        "codes": references.random_sign_codes(vocabulary, num_codebooks),
        "code_type": "sign",
        "scale": 0.125,
        "fine_ids": torch.randperm(vocabulary, generator=generator)[:second].int(),
        "fine_codes": references.random_sign_codes(second, num_codebooks, seed=3),
    }


@each_backend
@pytest.mark.parametrize(
    ("rows", "vocabulary", "k", "second"),
    [(0, 10, 1, 0), (1, 1, 1, 0), (3, 1500, 5, 100), (70, 700, 64, 7), (2, 5000, 5000, 9)],
)
def test_as_the_largest_of_all_logits(backend, rows, vocabulary, k, second, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    monkeypatch.setattr(top, "CHUNK_BYTES", 4 * vocabulary * 3)
    given = problem(rows, vocabulary, second=second)
    values, tokens = ops.topk(
        given["hidden"], k, **{n: v for n, v in given.items() if n != "hidden"}
    )
    logits = ops.logits(**given)
    assert values.shape == tokens.shape == (rows, k)
    assert values.dtype == torch.float32
    want = logits.topk(k).values
    # Scores of many rows and of one are sums in another order.
    torch.testing.assert_close(values, want, atol=1e-2, rtol=0)
    torch.testing.assert_close(values, logits.gather(1, tokens), atol=1e-2, rtol=0)
    assert all(len(set(row)) == k for row in tokens.tolist())
    assert not values.requires_grad


def by_sorting(logits, k):
    """The k largest, of equal ones the first, and NaN of token 0 where numbers are missing."""
    order = logits.float().nan_to_num(nan=-float("inf"), posinf=float("inf"), neginf=-1e38)
    found = order.sort(dim=-1, descending=True, stable=True)
    numbers = found.values[..., :k] > -float("inf")
    tokens = torch.where(numbers, found.indices[..., :k], 0)
    values = torch.where(numbers, logits.gather(-1, tokens), float("nan")).to(logits.dtype)
    return values, tokens


def equal(found, wanted):
    return torch.equal(found[0].nan_to_num(nan=7e7), wanted[0].nan_to_num(nan=7e7)) and torch.equal(
        found[1], wanted[1]
    )


@pytest.mark.skipif(not PATHS, reason="the compiled library was not built")
class TestCompiled:
    @settings(deadline=None, max_examples=60)
    @given(
        vocabulary=st.integers(1, 3000),
        share=st.floats(0, 1),
        seed=st.integers(0, 99),
        levels=st.sampled_from([1, 3, 50, 10**6]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        missing=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def test_exactly_the_largest_and_the_first_of_equal_ones(
        self, vocabulary, share, seed, levels, dtype, missing
    ):
        k = 1 + int(share * (vocabulary - 1))
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randint(levels, (3, vocabulary), generator=generator).div(levels)
        nan = torch.rand(3, vocabulary, generator=generator) < missing
        nan[0] = False
        logits = (logits - 0.4).masked_fill(nan, float("nan")).to(dtype)
        assert equal(cpu.largest(logits, k), by_sorting(logits, k))

    @pytest.mark.parametrize("k", [1, 2, 64, 65, 700, 701])
    def test_infinite_logits_are_in_the_order(self, k):
        logits = torch.randn(2, 701, generator=torch.Generator().manual_seed(0))
        logits[:, 5::7] = -float("inf")
        logits[1, 600] = float("inf")
        assert equal(cpu.largest(logits, k), by_sorting(logits, k))

    def test_threads_do_not_change_the_result(self):
        logits = torch.randn(5, 9001, generator=torch.Generator().manual_seed(0)).bfloat16()
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(cpu.largest(logits, 100))
        finally:
            torch.set_num_threads(threads)
        assert equal(found[1], found[0])
        assert equal(found[2], found[0])


@each_backend
@pytest.mark.parametrize("shape", [(700,), (2, 3, 700), (0, 700)])
def test_any_leading_dimensions_and_strides(backend, shape, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    logits = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))[..., 0]
    values, tokens = ops.largest(logits.requires_grad_(), 9)
    assert torch.equal(values, logits.topk(9).values)
    assert torch.equal(values, logits.gather(-1, tokens))
    assert not values.requires_grad


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(default):
    logits = torch.randn(3, 700)
    try:
        torch.set_default_dtype(default)
        values, _ = ops.largest(logits, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, logits.topk(9).values)


def test_the_default_device_does_not_matter():
    given = problem(2, 700)
    hidden = given.pop("hidden")
    wanted = ops.topk(hidden, 9, **given)
    with torch.device("meta"):
        found = ops.topk(hidden, 9, **given)
    assert equal(found, wanted)


def test_other_types_are_left_to_pytorch():
    logits = torch.randn(3, 700, dtype=torch.float64)
    assert torch.equal(ops.largest(logits, 9)[0], logits.topk(9).values)


def test_compiled_without_a_break():
    logits = torch.randn(3, 700)
    largest = torch.compile(ops.largest, fullgraph=True, backend="aot_eager")
    assert torch.equal(largest(logits, 9)[0], logits.topk(9).values)
    torch.library.opcheck(torch.ops.vqlogits.largest.default, (logits, 9))


@each_backend
def test_second_codes_count(backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    given = problem(3, 600, second=67)
    hidden = given.pop("hidden")
    values, tokens = ops.topk(hidden, 7, **given)
    scores = ops.scores(
        hidden, given["codebook"], given["codebook_bias"], scale=given["scale"]
    ).double()
    fine = {name: given[name] for name in ("fine_ids", "fine_codes")}
    wanted = references.logits(scores, given["codes"], "sign", **fine)
    torch.testing.assert_close(values.double(), wanted.topk(7).values, atol=1e-2, rtol=0)
    torch.testing.assert_close(values.double(), wanted.gather(1, tokens), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 30])
def test_logits_of_half_precision_are_not_rounded(dtype, rows):
    given = problem(rows, 700)
    for name in ("hidden", "codebook", "codebook_bias"):
        given[name] = given[name].to(dtype)
    hidden = given.pop("hidden")
    values, _ = ops.topk(hidden, 700, **given)
    assert values.dtype == torch.float32
    assert bool((values != values.to(dtype)).any())
    assert bool((values.diff(dim=1) <= 0).all())


def test_a_row_that_is_not_finite():
    given = problem(3, 600)
    hidden = given.pop("hidden")
    hidden[1, 3] = float("inf")
    values, tokens = ops.topk(hidden, 4, **given)
    if PATHS:
        assert bool(values[1].isnan().all())
        assert tokens[1].tolist() == [0, 0, 0, 0]
    assert bool(values[[0, 2]].isfinite().all())


@pytest.mark.parametrize("k", [0, 11, -1])
def test_a_number_that_cannot_be(k):
    given = problem(2, 10)
    hidden = given.pop("hidden")
    with pytest.raises(ValueError, match=rf"`k` must be in 1\.\.10, the vocabulary, got {k}"):
        ops.topk(hidden, k, **given)
    for largest in (ops.largest, torch.ops.vqlogits.largest.default):
        with pytest.raises(ValueError, match=rf"1\.\.10, the vocabulary, got {k}"):
            largest(torch.randn(2, 10), k)

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


@pytest.mark.parametrize("path", [path for path in PATHS if path != "plain"])
class TestKernel:
    @settings(deadline=None, max_examples=25)
    @given(vocabulary=st.integers(1, 2000), share=st.floats(0, 1), seed=st.integers(0, 99))
    def test_exactly_the_largest_and_the_first_of_equal_ones(self, path, vocabulary, share, seed):
        k = 1 + int(share * (vocabulary - 1))
        codes = references.random_sign_codes(vocabulary, 5, seed=seed)  # many tokens are equal
        scores = references.random_scores(3, 5, seed=seed)
        logits = cpu.expand(scores, codes, "sign", path)
        values, tokens = cpu.topk(scores, k, codes, "sign", path)
        order = logits.sort(descending=True, stable=True)
        assert torch.equal(values, order.values[:, :k])
        assert torch.equal(tokens, order.indices[:, :k])

    def test_threads_do_not_change_the_result(self, path):
        codes = references.random_sign_codes(9001, 30)
        scores = references.random_scores(5, 30)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(cpu.topk(scores, 100, codes, "sign", path))
        finally:
            torch.set_num_threads(threads)
        for values, tokens in found[1:]:
            assert torch.equal(values, found[0][0])
            assert torch.equal(tokens, found[0][1])

    def test_equal_logits_whichever_thread_is_first(self, path):
        codes = torch.zeros(60_000, 1, dtype=torch.uint8)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(4)
            for _ in range(40):
                _, tokens = cpu.topk(torch.ones(2, 1), 300, codes, "sign", path)
                assert torch.equal(tokens, torch.arange(300).expand(2, -1))
        finally:
            torch.set_num_threads(threads)

    def test_second_codes_count(self, path):
        codes, scores = references.random_sign_codes(600, 40), references.random_scores(4, 40)
        fine = (torch.arange(0, 600, 9).int(), references.random_sign_codes(67, 40, seed=8))
        logits = cpu.expand(scores, codes, "sign", path, *fine)
        values, tokens = cpu.topk(scores, 7, codes, "sign", path, *fine)
        assert torch.equal(values, logits.topk(7).values)
        assert torch.equal(values, logits.gather(1, tokens))

    def test_a_row_that_is_not_finite(self, path):
        codes, scores = references.random_sign_codes(600, 40), references.random_scores(3, 40)
        scores[1, 3] = float("inf")
        values, tokens = cpu.topk(scores, 4, codes, "sign", path)
        assert bool(values[1].isnan().all())
        assert tokens[1].tolist() == [0, 0, 0, 0]
        assert bool(values[[0, 2]].isfinite().all())


@pytest.mark.parametrize("k", [0, 11, -1])
def test_a_number_that_cannot_be(k):
    given = problem(2, 10)
    hidden = given.pop("hidden")
    with pytest.raises(ValueError, match=rf"`k` must be in 1\.\.10, the vocabulary, got {k}"):
        ops.topk(hidden, k, **given)

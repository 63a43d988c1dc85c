import copy
import re
import sys
import threading
from pathlib import Path

import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, library

PATHS = cpu.paths()

pytestmark = pytest.mark.skipif(not PATHS, reason="the compiled kernel was not built")
each_path = pytest.mark.parametrize("path", PATHS)
each_path_of_codes = pytest.mark.parametrize(
    ("path", "code_type"),
    [
        (path, kind)
        for kind in ("sign", "index")
        for path in PATHS
        if (path, kind) != ("amx", "index")
    ],
)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def error_bound(scores, code_type, path):
    """Largest error per row, [N, 1], from the arithmetic of the kernel.

    `avx512`: codes are cut into tables of 5 signs, or of as many indices as fit 5 bits, three
    tables a word, at most 17 words a segment, in segments of equal length. With b the sum over the
    F tables of a segment of half their range, entries are multiples of b / (32700 - F / 2), each
    rounded by at most half of one. `avx2`, `neon`: the same with 4 bits, two tables a word and 25
    words. `amx`: scores are multiples of the largest over 32,639. `plain` rounds as float32 does,
    and so do the sums of all.
    """
    scores = scores.double()
    if code_type == "sign":
        half_ranges, bits = scores.abs(), 1
    else:
        half_ranges = (scores.amax(2) - scores.amin(2)) / 2
        bits = max(1, (scores.shape[2] - 1).bit_length())
    largest = scores.abs() if code_type == "sign" else scores.abs().amax(2)
    bound = 1e-6 * largest.sum(1)
    if path == "amx":
        bound += scores.shape[1] / 2 * largest.amax(1) / 32639
    elif path != "plain":
        field, fields, most = (5, 3, 17) if path == "avx512" else (4, 2, 25)
        per_word = fields * (field // bits)
        words = -(-scores.shape[1] // per_word)
        segments = -(-words // most)
        for segment in half_ranges.split(-(-words // segments) * per_word, dim=1):
            tables = -(-segment.shape[1] // per_word) * fields
            bound += tables / 2 * segment.sum(1) / (32700 - tables / 2)
    return bound.unsqueeze(1)


def codes_and_scores(code_type):
    if code_type == "sign":
        return references.random_sign_codes(600, 100), references.random_scores(9, 100)
    return references.random_index_codes(600, 40, 3), references.random_scores(9, 40, 3)


@each_path
@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks"), references.SIGN_SHAPES)
def test_sign_codes_stay_within_the_error_bound(path, rows, vocabulary, num_codebooks):
    scores = references.random_scores(rows, num_codebooks)
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    if rows:
        # The largest sums there can be: a token that agrees with every score, and its opposite.
        codes[0] = ops.pack_signs(scores[-1] > 0)
        codes[-1] = ops.pack_signs(scores[-1] <= 0)
    got = cpu.expand(scores, codes, "sign", path)
    error = (got.double() - references.logits(scores, codes, "sign")).abs()
    assert got.shape == (rows, vocabulary)
    assert bool((error <= error_bound(scores, "sign", path)).all())


TABLE_PATHS = [path for path in PATHS if path != "plain"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [None, 3000])
@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks"), references.SIGN_SHAPES)
def test_gradients_of_sign_codes(rows, vocabulary, num_codebooks, pieces, dtype, fast, monkeypatch):
    """Products of one rounded type, summed in float32: bfloat16 only where it is fast."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    if pieces is not None:
        monkeypatch.setattr(cpu, "PIECE_BYTES", pieces)
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    grad = references.random_scores(rows, vocabulary).to(dtype)
    sums = cpu.expand_backward(grad, codes, num_codebooks)
    assert sums.dtype == torch.float32
    want = grad.double() @ references.sign_matrix(codes, num_codebooks)
    absolute = grad.double().abs().sum(1, keepdim=True)
    # In bfloat16 each piece's sum is rounded once, to 8 digits of at most its absolute value.
    half = dtype == torch.bfloat16 and fast
    bound = (2**-8 if half else 1e-6) * absolute
    assert ((sums.double() - want).abs() <= bound).all()
    if not half:
        torch.testing.assert_close(sums.double(), want, rtol=1e-4, atol=1e-4)


def test_gradients_of_strided_codes_and_logits():
    codes = references.random_sign_codes(333, 100)
    grad = references.random_scores(9, 333)
    want = cpu.expand_backward(grad, codes, 100)
    strided = torch.stack([grad, grad], 2)[..., 0], codes.T.contiguous().T
    torch.testing.assert_close(cpu.expand_backward(*strided, 100), want)


def test_logits_are_written_where_they_are_wanted():
    codes, scores = codes_and_scores("sign")
    for path in (path for path in PATHS if path != "plain"):
        place = torch.full((9, 600), torch.nan)
        made = cpu.expand(scores, codes, "sign", path, out=place)
        assert made.data_ptr() == place.data_ptr()
        assert torch.equal(made, cpu.expand(scores, codes, "sign", path))


each_table_path = pytest.mark.parametrize("path", TABLE_PATHS)


def second_codes(vocabulary, count, num_codebooks):
    """`fine_ids` in no order, some of them neighbours, and `fine_codes`."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randperm(vocabulary, generator=generator)[:count]
    return ids.int(), references.random_sign_codes(count, num_codebooks, seed=4)


@each_table_path
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks"), references.SIGN_SHAPES)
def test_second_codes_stay_within_the_error_bound(path, rows, vocabulary, num_codebooks, share):
    scores = references.random_scores(rows, num_codebooks)
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    ids, fine_codes = second_codes(vocabulary, int(share * vocabulary), num_codebooks)
    if rows and len(ids):
        fine_codes[0] = ops.pack_signs(scores[-1] > 0)
        fine_codes[-1] = ops.pack_signs(scores[-1] <= 0)
    got = cpu.expand(scores, codes, "sign", path, ids, fine_codes)
    error = (got.double() - references.logits(scores, codes, "sign", ids, fine_codes)).abs()
    # Look-ups of the second code are off by as much as the first one's, and count half.
    assert bool((error <= 1.5 * error_bound(scores, "sign", path)).all())


@each_table_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_codes_are_rounded_once(path, dtype):
    codes, scores = codes_and_scores("sign")
    fine = second_codes(600, 60, 100)
    scores = scores.to(dtype)
    got = cpu.expand(scores, codes, "sign", path, *fine)
    assert torch.equal(got, cpu.expand(scores.float(), codes, "sign", path, *fine).to(dtype))


@each_table_path
def test_changed_second_codes_are_noticed(path):
    codes, scores = codes_and_scores("sign")
    ids, fine_codes = second_codes(600, 60, 100)

    def check():
        got = cpu.expand(scores, codes, "sign", path, ids, fine_codes)
        want = references.logits(scores, codes, "sign", ids, fine_codes)
        assert bool(((got - want).abs() <= 1.5 * error_bound(scores, "sign", path)).all())

    check()
    fine_codes[7] ^= 255
    fine_codes[:, -1] &= 15
    check()
    ids.copy_(torch.arange(60))
    check()
    codes[:30] ^= codes[30:60]
    check()


@each_table_path
def test_other_tokens_of_second_codes_are_noticed(path):
    codes, scores = codes_and_scores("sign")
    ids, fine_codes = second_codes(600, 60, 100)
    for tokens in (ids, torch.arange(60)):
        got = cpu.expand(scores, codes, "sign", path, tokens, fine_codes)
        want = references.logits(scores, codes, "sign", tokens, fine_codes)
        assert bool(((got - want).abs() <= 1.5 * error_bound(scores, "sign", path)).all())


@each_table_path
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 600], IndexError, r"holds 3 and 600, but must lie in 0\.\.599"),
        ([-1, 3], IndexError, "holds -1 and 3, but must lie in"),
        ([3, 3], ValueError, "names a token twice"),
    ],
)
def test_impossible_tokens_of_second_codes_are_refused(path, ids, error, message):
    codes, scores = codes_and_scores("sign")
    with pytest.raises(error, match=message):
        cpu.expand(scores, codes, "sign", path, torch.tensor(ids), codes[:2].clone())


@each_path
@pytest.mark.parametrize(("rows", "vocabulary", "books", "size"), references.INDEX_SHAPES)
def test_index_codes_stay_within_the_error_bound(path, rows, vocabulary, books, size):
    scores = references.random_scores(rows, books, size) + 3
    codes = references.random_index_codes(vocabulary, books, size)
    if not cpu.supports(path, scores, codes, "index"):
        assert size > cpu.LARGEST_CODEBOOKS[path]
        pytest.skip("too many codewords")
    if rows:
        codes[0] = scores[-1].argmax(1)
        codes[-1] = scores[-1].argmin(1)
    for stored in (codes, codes.int()):
        got = cpu.expand(scores, stored, "index", path)
        error = (got.double() - references.logits(scores, codes, "index")).abs()
        assert bool((error <= error_bound(scores, "index", path)).all())


@each_table_path
def test_sixteen_bits_cost_little_of_the_deviation_of_the_logits(path):
    scores = references.random_scores(4, 1000)
    codes = references.random_sign_codes(5000, 1000)
    want = references.logits(scores, codes, "sign")
    error = cpu.expand(scores, codes, "sign", path).double() - want
    assert 1e-5 < error.std() / want.std() < 2e-3
    assert error.abs().max() / want.std() < 5e-3


@each_path_of_codes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded(path, code_type, dtype):
    codes, scores = codes_and_scores(code_type)
    scores = scores.to(dtype)
    got = cpu.expand(scores, codes, code_type, path)
    assert got.dtype == dtype
    assert torch.equal(got, cpu.expand(scores.float(), codes, code_type, path).to(dtype))


@each_path
def test_ties_are_rounded_to_the_even_number(path):
    codes, scores = references.random_sign_codes(60_000, 40), references.random_scores(32, 40)
    scores = scores.bfloat16()
    exact = cpu.expand(scores.float(), codes, "sign", path)
    ties = exact.view(torch.int32) & 0xFFFF == 0x8000
    assert int(ties.sum()) >= 8
    assert torch.equal(cpu.expand(scores, codes, "sign", path), exact.bfloat16())


@each_path
def test_half_precision_overflows_to_infinity(path):
    codes = ops.pack_signs(torch.tensor([[True], [False]]))
    logits = cpu.expand(torch.full((1, 1), 65504.0).half(), codes, "sign", path)
    assert logits.tolist() == [[65504.0, -65504.0]]
    two = ops.pack_signs(torch.tensor([[True, True], [False, False], [True, False]]))
    logits = cpu.expand(torch.full((1, 2), 65504.0).half(), two, "sign", path)
    assert logits.tolist() == [[float("inf"), float("-inf"), 0.0]]


@each_path_of_codes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_spoil_their_own_row_only(path, code_type, value):
    codes, scores = codes_and_scores(code_type)
    want = cpu.expand(scores, codes, code_type, path)
    scores[4].view(-1)[7] = value
    got = cpu.expand(scores, codes, code_type, path)
    others = torch.arange(9) != 4
    assert torch.equal(got[others], want[others])
    if path != "plain" or (code_type == "sign" and value != value):
        assert bool(got[4].isnan().all())
    else:
        named = codes[:, 2] == 1 if code_type == "index" else torch.ones(600, dtype=torch.bool)
        assert bool((~got[4, named].isfinite()).all())
        torch.testing.assert_close(got[4, ~named], want[4, ~named])


@each_path
@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-30, 1e30])
def test_small_and_large_scores(path, factor):
    codes, scores = codes_and_scores("sign")
    got = cpu.expand(scores * factor, codes, "sign", path)
    want = references.logits(scores * factor, codes, "sign")
    # Scores below the smallest normal scale of 2^-126 count as zero.
    error = error_bound(scores, "sign", path) * factor + 100 * 2.0**-126
    assert bool(((got.double() - want).abs() <= error).all())


@each_path
def test_sums_beyond_float32_are_not_finite(path):
    codes = ops.pack_signs(torch.ones(3, 40, dtype=torch.bool))
    got = cpu.expand(torch.full((1, 40), 3e38), codes, "sign", path)
    assert not bool(got.isfinite().any())


@each_path_of_codes
def test_strides_do_not_matter(path, code_type):
    codes, scores = codes_and_scores(code_type)
    want = cpu.expand(scores, codes, code_type, path)
    wide = torch.cat([codes, codes], 1)[::2, : codes.shape[1]]
    strided = scores.repeat_interleave(2, dim=-1)[..., ::2]
    assert not wide.is_contiguous()
    assert not strided.is_contiguous()
    assert torch.equal(cpu.expand(strided, wide, code_type, path), want[:, ::2])


@each_path_of_codes
def test_a_row_does_not_depend_on_the_others(path, code_type):
    codes, scores = codes_and_scores(code_type)
    together = cpu.expand(scores, codes, code_type, path)
    for n in range(9):
        alone = cpu.expand(scores[n : n + 1], codes, code_type, path)
        if path != "plain":
            assert torch.equal(alone[0], together[n])  # integers are summed
        torch.testing.assert_close(alone[0], together[n])


@each_path
def test_threads_do_not_change_the_result(path):
    codes = references.random_sign_codes(9001, 300)
    scores = references.random_scores(5, 300)
    torch.set_num_threads(1)
    want = cpu.expand(scores, codes, "sign", path)
    loaded = library.load()
    try:
        for own_threads in (False, True):
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                if own_threads:
                    loaded.vqlogits_use_openmp(None)
                assert torch.equal(cpu.expand(scores, codes, "sign", path), want)
    finally:
        library.use_threads_of_torch(loaded)


def flags_of_memory(address):
    """What the system has been told about the memory at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("there is no memory at this address")


@each_path
def test_outputs_of_many_pages(path):
    codes, scores = references.random_sign_codes(9001, 60), references.random_scores(1000, 60)
    logits = cpu.expand(scores, codes, "sign", path)
    assert logits.nbytes > 32 << 20  # from which on large pages are asked for
    if sys.platform == "linux" and path != "plain":
        assert "hg" in flags_of_memory(logits.data_ptr() + logits.nbytes // 2)
    some = slice(None, None, 37)
    error = (logits[some].double() - references.logits(scores[some], codes, "sign")).abs()
    assert bool((error <= error_bound(scores[some], "sign", path)).all())


@each_path
def test_calls_from_many_threads(path):
    codes = references.random_sign_codes(3000, 100)
    failures = []

    def work(seed):
        scores = references.random_scores(3, 100, seed=seed)
        want = references.logits(scores, codes, "sign")
        for _ in range(20):
            error = (cpu.expand(scores, codes, "sign", path).double() - want).abs()
            if not bool((error <= error_bound(scores, "sign", path)).all()):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@each_path
@pytest.mark.parametrize("inference", [False, True])
def test_edits_of_the_codes_are_noticed(path, inference, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "auto" if inference else path)
    scores = references.random_scores(2, 100)
    with torch.inference_mode(inference):
        codes = references.random_sign_codes(50, 100)
        before = ops.expand(scores, codes, code_type="sign")
        codes[7] ^= 255
        codes[7, -1] &= 15
        after = ops.expand(scores, codes, code_type="sign")
    changed = (before - after).abs().amax(0) > 0.1
    assert changed.nonzero().tolist() == [[7]]
    torch.testing.assert_close(after[:, 7], -before[:, 7], atol=1e-2, rtol=0)


@each_path
def test_modules_with_codes_can_be_copied_moved_and_saved(path, tmp_path):
    module = torch.nn.Module()
    module.register_buffer("codes", references.random_sign_codes(50, 100))
    scores = references.random_scores(2, 100)
    want = cpu.expand(scores, module.codes, "sign", path)
    twin = copy.deepcopy(module)
    twin.codes[0] ^= 255
    moved = copy.deepcopy(module).to(torch.bfloat16).to("cpu")
    torch.save(module.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert set(saved) == {"codes"}
    for codes in (module.codes, moved.codes, saved["codes"], module.codes.clone()):
        assert torch.equal(cpu.expand(scores, codes, "sign", path), want)
    assert not torch.equal(cpu.expand(scores, twin.codes, "sign", path), want)


@each_path
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_index_out_of_range_is_refused(path, wrong):
    codes = references.random_index_codes(50, 2, 3).int()
    codes[9, 1] = wrong
    with pytest.raises(IndexError, match=f"`codes` holds {wrong}, but .* run from 0 to 2"):
        cpu.expand(references.random_scores(1, 2, 3), codes, "index", path)

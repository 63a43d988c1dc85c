import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.sizes import (
    METHODS,
    HeadSize,
    check_size_options,
    choose_size,
    codewords_within,
)

SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576}


@pytest.mark.parametrize(("reduction", "bits"), [(0.995, 245), (0.99, 490), (0.98, 981)])
def test_sign_sizes_of_smollm2(reduction, bits):
    size = choose_size("signs", param_reduction=reduction, **SMOLLM2)
    assert size == HeadSize("sign", bits, 2, num_fine_tokens=4_915)


@pytest.mark.parametrize(("share", "tokens"), [(0.0, 0), (0.25, 12_288), (1.0, 49_152)])
def test_share_of_tokens_with_a_second_code(share, tokens):
    assert choose_size("signs", fine_share=share, **SMOLLM2).num_fine_tokens == tokens


def test_default_keeps_two_per_cent():
    assert choose_size("signs", **SMOLLM2).num_codebooks == 981


@given(
    st.sampled_from(METHODS),
    st.floats(0.01, 0.999),
    st.integers(100, 300_000),
    st.integers(8, 8192),
)
def test_reduction_is_reached_and_nearly_used_up(method, reduction, vocab_size, hidden_size):
    dense = vocab_size * hidden_size
    codewords, refusal = (1 - reduction) * dense / (hidden_size + 1), ""
    try:
        size = choose_size(
            method, vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
        )
    except ConversionError as error:
        refusal = str(error)
    if "larger than the dense layer" in refusal:
        code = {"signs": 1.1 * (codewords / 8 + 1) + 0.4, "residual": codewords / 4 + 1}
        floats = codewords * (hidden_size + 1) + 2 * hidden_size
        assert vocab_size * code.get(method, 4) + 4 * floats > 4 * dense
        return
    if refusal:
        assert (1 - reduction) * dense < hidden_size + 2
        return
    assert size.stored_bytes(vocab_size, hidden_size, 4) <= 4 * dense
    kept = size.stored_codewords * (hidden_size + 1)
    assert kept <= (1 - reduction) * dense * (1 + 1e-9)
    one_more = 4 if method == "residual" else 1
    assert kept + one_more * (hidden_size + 1) > (1 - reduction) * dense * (1 - 1e-9)


def test_bits_and_bits_per_weight():
    assert choose_size("signs", bits=491, **SMOLLM2).num_codebooks == 491
    assert choose_size("signs", bits_per_weight=0.5, **SMOLLM2).num_codebooks == 288


def test_index_sizes():
    assert choose_size("kmeans", param_reduction=0.99, **SMOLLM2) == HeadSize("index", 1, 490)
    assert choose_size("kmeans", codebook_size=300, **SMOLLM2) == HeadSize("index", 1, 300)
    # Every token its own code: lossless, and larger than the dense layer by the codes.
    assert choose_size("kmeans", codebook_size=49_152, **SMOLLM2) == HeadSize("index", 1, 49_152)
    assert choose_size("residual", param_reduction=0.99, **SMOLLM2) == HeadSize("index", 122, 4)
    assert choose_size("residual", param_reduction=0.99, num_codebooks=8, **SMOLLM2) == HeadSize(
        "index", 8, 61
    )
    assert choose_size("residual", num_codebooks=3, codebook_size=7, **SMOLLM2) == HeadSize(
        "index", 3, 7
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kmean", {}, "`method` must be one of .* got 'kmean'"),
        ("signs", {"param_reduction": 0.0}, "between 0 and 1 .* got 0.0"),
        ("signs", {"param_reduction": 1.0}, "between 0 and 1 .* got 1.0"),
        ("signs", {"param_reduction": 0.999999}, "cannot be reached .* At most 0.9999"),
        ("signs", {"bits": 0}, "`bits` must be at least 1, got 0"),
        ("signs", {"bits_per_weight": 0.0001}, "less than one bit a token"),
        ("signs", {"bits": 32 * 576 + 1}, "`bits` 18433 makes codes of more than 32 bits a weight"),
        (
            "residual",
            {"num_codebooks": 10_000, "codebook_size": 4},
            "10000 and `codebook_size` 4 makes codes of more than 32 bits a weight at hidden size",
        ),
        ("residual", {"num_codebooks": 5000}, "too few"),
        ("signs", {"bits": 5, "param_reduction": 0.9}, "both choose the size"),
        ("signs", {"bits": 5, "bits_per_weight": 0.9}, "both choose the size"),
        ("signs", {"num_codebooks": 5}, "`num_codebooks` does not apply to method 'signs'"),
        ("signs", {"codebook_size": 5}, "`codebook_size` does not apply"),
        ("signs", {"fine_share": 1.1}, "`fine_share` must lie between 0 and 1, got 1.1"),
        ("signs", {"fine_share": -0.1}, "`fine_share` must lie between 0 and 1, got -0.1"),
        ("signs", {"fine_share": float("nan")}, "`fine_share` must lie between 0 and 1, got nan"),
        ("residual", {"fine_share": 0.1}, "second codes go with 'signs'"),
        ("kmeans", {"bits": 5}, "`bits` does not apply to method 'kmeans'"),
        ("kmeans", {"num_codebooks": 2}, "has one codebook, but `num_codebooks` is 2"),
        ("kmeans", {"codebook_size": 49_153}, "larger than the vocabulary 49152"),
        ("kmeans", {"codebook_size": 0}, "`codebook_size` must be at least 1, got 0"),
        ("kmeans", {"codebook_size": 5, "param_reduction": 0.9}, "both choose the size"),
        ("residual", {"num_codebooks": 0}, "`num_codebooks` must be at least 1, got 0"),
        (
            "residual",
            {"num_codebooks": 2, "codebook_size": 4, "param_reduction": 0.9},
            "both choose the size",
        ),
        ("residual", {"num_codebooks": 5000, "param_reduction": 0.99}, "too few"),
        ("residual", {"codebook_size": 5000, "param_reduction": 0.99}, "too few"),
    ],
)
def test_bad_sizes_are_refused(method, options, message):
    with pytest.raises(ConversionError, match=message):
        choose_size(method, **options, **SMOLLM2)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "signs",
            {"param_reduction": 0.1},
            r"^`param_reduction` 0.1 makes codes of more than 32 bits a weight at hidden size 768: "
            r"the head would be larger than the dense layer \(45\d,\d{3},\d{3} bytes against "
            r"154,389,504 in float32\)",
        ),
        ("signs", {"param_reduction": 0.6}, "0.6 makes codes and 20076 codewords at hidden"),
        ("signs", {"bits_per_weight": 30.0}, "^`bits_per_weight` 30.0 makes codes and 23040 code"),
        ("signs", {"bits": 20_000}, "^`bits` 20000 makes codes and 20000 codewords"),
        # A code of 2 bits takes a byte.
        ("residual", {"param_reduction": 0.6}, "^`param_reduction` 0.6 makes codes of more"),
    ],
)
def test_a_head_larger_than_the_dense_layer_is_refused(method, options, message):
    with pytest.raises(ConversionError, match=message):
        choose_size(method, **options, vocab_size=50_257, hidden_size=768)


def test_the_default_is_named_where_it_is_too_large():
    with pytest.raises(ConversionError, match=r"^`param_reduction` 0.98 \(the default\) makes"):
        choose_size("signs", vocab_size=256_000, hidden_size=64)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magic", {}, "`method` must be one of .* got 'magic'"),
        ("signs", {"param_reduction": 1.5}, "between 0 and 1 .* got 1.5"),
        ("signs", {"param_reduction": NAN}, "between 0 and 1 .* got nan"),
        ("signs", {"bits_per_weight": NAN}, "`bits_per_weight` must lie above 0 .* got nan"),
        ("signs", {"bits_per_weight": INFINITY}, "be at most 32, got inf"),
        ("signs", {"bits_per_weight": -1.0}, "`bits_per_weight` must lie above 0 .* got -1.0"),
        ("signs", {"bits": -3}, "`bits` must be at least 1, got -3"),
        ("residual", {"num_codebooks": 0}, "`num_codebooks` must be at least 1, got 0"),
        ("kmeans", {"codebook_size": 0}, "`codebook_size` must be at least 1, got 0"),
        ("signs", {"bits": 5, "param_reduction": 0.9}, "both choose the size"),
        ("signs", {"codebook_size": 5}, "`codebook_size` does not apply to method 'signs'"),
        ("kmeans", {"num_codebooks": 2}, "has one codebook, but `num_codebooks` is 2"),
        ("kmeans", {"codebook_size": 5, "param_reduction": 0.9}, "both choose the size"),
    ],
)
def test_what_no_model_allows_is_refused_without_one(method, options, message):
    with pytest.raises(ConversionError, match=message):
        check_size_options(method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_size_is_checked_against_the_model_only_later(method):
    check_size_options(method)
    check_size_options(method, param_reduction=0.999999)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (HeadSize("sign", 9, 2), 100 * 2 + 9 * 33 * 4 + 2 * 32 * 4),
        (HeadSize("index", 3, 256), 100 * 3 + 3 * 256 * 33 * 4 + 2 * 32 * 4),
        (HeadSize("index", 1, 257), 100 * 4 + 257 * 33 * 4 + 2 * 32 * 4),
    ],
)
def test_bytes_of_a_head(size, expected):
    assert size.stored_bytes(vocab_size=100, hidden_size=32, itemsize=4) == expected


def test_codewords_within_is_exact_at_round_numbers():
    # (1 - 0.98) * 100 is 2.0000000000000018 or 1.9999999999999996 in floating point.
    assert codewords_within(0.98, 1_000, 1) == 10

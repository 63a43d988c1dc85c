import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.nested_sizes import check_nested, choose_nested_size
from hf_vqlogits.conversion.sizes import choose_size

SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576}


@pytest.mark.parametrize("order", [(0.99, 0.98, 0.96), (0.96, 0.99, 0.98)])
def test_the_smallest_reduction_holds_the_others(order):
    size = choose_nested_size(order, **SMOLLM2)
    assert (size.num_codebooks, size.nested_codebooks) == (1962, (490, 981))
    assert size.num_fine_tokens == 4_915
    assert [(rung.num_codebooks, rung.nested_codebooks) for rung in size.rungs] == [
        (490, ()),
        (981, (490,)),
        (1962, (490, 981)),
    ]
    assert {rung.num_fine_tokens for rung in size.rungs} == {4_915}


@given(st.lists(st.floats(0.9, 0.999), min_size=2, max_size=4, unique=True))
def test_sizes_are_those_of_the_reductions_alone(reductions):
    alone = sorted(
        choose_size("signs", param_reduction=r, fine_share=0.0, **SMOLLM2).num_codebooks
        for r in reductions
    )
    if len(set(alone)) < len(alone):
        with pytest.raises(ConversionError, match="gives the same .* bits a token"):
            choose_nested_size(reductions, fine_share=0.0, **SMOLLM2)
        return
    size = choose_nested_size(reductions, fine_share=0.0, **SMOLLM2)
    assert [*size.nested_codebooks, size.num_codebooks] == alone
    assert size.num_fine_tokens == 0


def test_bytes_count_the_codebooks_of_all_sizes():
    size = choose_nested_size((0.99, 0.98), **SMOLLM2)
    plain = choose_size("signs", param_reduction=0.98, **SMOLLM2)
    more = size.stored_bytes(49_152, 576, 2) - plain.stored_bytes(49_152, 576, 2)
    assert more == 490 * 577 * 2


@pytest.mark.parametrize(
    ("nested", "options", "message"),
    [
        ([0.9, 0.8], {"method": "kmeans"}, "sign codes in one another; .* to method 'kmeans'"),
        ([0.9, 0.8], {"bits": 9}, "`nested` and `bits` both choose the size"),
        ([0.9, 0.8], {"param_reduction": 0.9}, "`nested` and `param_reduction` both choose"),
        (
            [0.9, 0.8],
            {"max_perplexity_increase": 0.02},
            "`nested` and `max_perplexity_increase` both choose the size; give one of them",
        ),
        ([0.9, 0.8], {"ladder": True}, "`nested` and `ladder` contradict each other"),
        (
            [0.9, 0.8],
            {"embeddings": "tied"},
            "`embeddings` 'tied': the table .* Use 'vq' or 'keep'",
        ),
        ([0.9], {}, r"at least two reductions, got \[0.9\]; for one size use `param_reduction`"),
        ([], {}, r"at least two reductions, got \[\]"),
        ([0.9, 0.8, 0.9], {}, "`nested` holds 0.9 more than once"),
        ([0.9, 1.0], {}, r"between 0 and 1 \(exclusive\), got 1.0"),
        ([0.0, 0.9], {}, r"between 0 and 1 \(exclusive\), got 0.0"),
        ([0.9, float("nan")], {}, r"between 0 and 1 \(exclusive\), got nan"),
    ],
)
def test_bad_options(nested, options, message):
    options = {"method": "signs", "embeddings": "keep", "bits": None} | options
    with pytest.raises(ConversionError, match=message):
        check_nested(nested, options.pop("method"), options.pop("embeddings"), **options)


@pytest.mark.parametrize("embeddings", ["keep", "vq"])
def test_what_goes_together(embeddings):
    check_nested((0.9, 0.8), "signs", embeddings, param_reduction=None, bits=None)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ((0.9999999, 0.9), "`nested` holds 0.9999999, but: `param_reduction` 0.9999999 cannot be"),
        ((0.99, 0.1), "`nested` holds 0.1, but: `param_reduction` 0.1 makes codes"),
        (
            (0.76, 0.77, 0.78, 0.79, 0.8, 0.81),  # each alone is smaller
            r"`nested` \[0.76, 0.77, 0.78, 0.79, 0.8, 0.81\] makes .* larger than the dense layer",
        ),
        ((0.99, 0.990001), "`nested` holds 0.99 and .* the same 490 bits a token with V = 49152"),
    ],
)
def test_sizes_that_the_model_does_not_allow(nested, message):
    with pytest.raises(ConversionError, match=message):
        choose_nested_size(nested, **SMOLLM2)

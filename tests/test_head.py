import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny import dense_weight, perturb, reference_logits
from torch import nn
from torch.nn.functional import cross_entropy

from hf_vqlogits import VQLogitsHead

D, V = 12, 300
CODES = {
    "sign": {"code_type": "sign", "num_codebooks": 19, "codebook_size": 2},
    "sign, whole bytes": {"code_type": "sign", "num_codebooks": 16, "codebook_size": 2},
    "sign, one bit": {"code_type": "sign", "num_codebooks": 1, "codebook_size": 2},
    "sign, second codes": {
        "code_type": "sign",
        "num_codebooks": 19,
        "codebook_size": 2,
        "num_fine_tokens": 30,
    },
    "index, G = 1": {"code_type": "index", "num_codebooks": 1, "codebook_size": 40},
    "index, uint8": {"code_type": "index", "num_codebooks": 3, "codebook_size": 256},
    "index, int32": {"code_type": "index", "num_codebooks": 2, "codebook_size": 257},
    "index, K = 1": {"code_type": "index", "num_codebooks": 2, "codebook_size": 1},
}
STATISTICS = ("hidden_mean", "fold_direction")
AFTER = {"logit_scale": 0.5, "final_logit_softcapping": 2.0}


def make_head(fields: dict, *, seed: int = 0, **more) -> VQLogitsHead:
    config = {"vocab_size": V, "hidden_size": D, "num_fine_tokens": 0, "logit_scale": 1.0}
    config |= {"nested_codebooks": []}
    config |= fields | more
    torch.manual_seed(seed)
    head = VQLogitsHead(SimpleNamespace(**({"final_logit_softcapping": None} | config)))
    perturb(head)
    return head


@pytest.fixture(params=CODES.values(), ids=CODES.keys())
def head(request) -> VQLogitsHead:
    return make_head(request.param)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("fields", CODES.values(), ids=CODES.keys())
def test_logits_are_sums_of_the_scores_that_codes_name(fields, after, hidden):
    head = make_head(fields, **after)
    torch.testing.assert_close(
        head(hidden).double(), reference_logits(head, hidden), atol=1e-2, rtol=1e-2
    )
    head.double()
    torch.testing.assert_close(head(hidden.double()), reference_logits(head, hidden))


def test_any_leading_dimensions(head, hidden):
    logits = head(hidden)
    assert logits.shape == (2, 5, V)
    torch.testing.assert_close(head(hidden[0, 0]), logits[0, 0], atol=2e-2, rtol=1e-2)
    assert head(hidden[:, :0]).shape == (2, 0, V)
    assert head(hidden[None]).shape == (1, 2, 5, V)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("name", ["sign", "index, uint8"])
def test_loss_is_the_cross_entropy_of_the_logits(name, after, reduction, hidden):
    head = make_head(CODES[name], **after)
    labels = torch.tensor([[0, 1, -100, V - 1, 7], [3, -100, 5, 9, 2]])
    options = {"reduction": reduction, "label_smoothing": 0.2}
    loss = head(hidden, labels, **options)
    wanted = cross_entropy(
        reference_logits(head, hidden).flatten(0, 1), labels.flatten(), **options
    )
    wanted = wanted.view(labels.shape) if reduction == "none" else wanted
    torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-4)


def test_ignored_labels(hidden):
    head = make_head(CODES["sign"])
    labels = torch.tensor([[0, 1, 5, 6, 7], [3, 5, 5, 9, 2]])
    loss = head(hidden, labels, ignore_index=5)
    wanted = cross_entropy(
        reference_logits(head, hidden).flatten(0, 1), labels.flatten(), ignore_index=5
    )
    torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("name", ["sign", "index, uint8"])
def test_gradients_are_those_of_the_dense_layer(name, with_labels, hidden):
    head = make_head(CODES[name]).double()
    rows = hidden.double().requires_grad_()
    labels = torch.arange(10).view(2, 5)

    def loss_of(logits):
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss = head(rows, labels) if with_labels else loss_of(head(rows))
    given = torch.autograd.grad(loss, [rows, head.codebook, head.codebook_bias])

    codebook, bias = (p.detach().requires_grad_() for p in (head.codebook, head.codebook_bias))
    columns = torch.cat([codebook, bias[..., None]], -1) * head.score_scale
    if head.code_type == "sign":
        powers = torch.arange(head.num_codebooks)
        bits = (head.codes[:, powers // 8] >> (powers % 8)) & 1
        dense = (bits * 2.0 - 1.0).double() @ columns
    else:
        dense = sum(columns[g, head.codes[:, g].long()] for g in range(head.num_codebooks))
    loss = loss_of(rows @ dense[:, :-1].T + dense[:, -1])
    wanted = torch.autograd.grad(loss, [rows, codebook, bias])
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_wrong_shapes_are_named(hidden):
    head = make_head(CODES["sign"])
    with pytest.raises(ValueError, match=r"must end in the hidden size 12, got shape \(2, 5, 11\)"):
        head(hidden[..., 1:])
    with pytest.raises(ValueError, match=r"shape of the positions \(2, 5\), got \(2, 4\)"):
        head(hidden, torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
def test_to_linear_is_the_same_layer(head, after, hidden):
    weight, bias = head.to_linear()
    wanted = dense_weight(head)
    torch.testing.assert_close(weight.double(), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.double(), wanted[1], atol=1e-5, rtol=1e-5)
    linear = nn.Linear(D, V)
    linear.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(head.postprocess(linear(hidden)), head(hidden), atol=2e-2, rtol=1e-2)


def test_to_linear_sums_half_precision_codewords_exactly():
    head = make_head(CODES["sign"] | {"num_codebooks": 200}).bfloat16()
    weight, bias = head.to_linear()
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight.double(), dense_weight(head)[0], atol=1e-5, rtol=1e-5)


def test_random_heads_hold_valid_codes_and_logits_like_a_dense_layers(head):
    head.reset_parameters()
    head.check_codes()
    expected = torch.uint8 if head.codebook_size <= 256 else torch.int32
    assert head.codes.dtype == expected
    assert head.codes.shape[0] == head.out_features == V
    if head.num_codebooks * (head.codebook_size - 1) > 1:  # one bit or one codeword: no spread
        assert len(head.codes.unique(dim=0)) > 30
    hidden = torch.randn(4000, D)
    deviation = float(head(hidden).detach().std())
    assert 0.4 < deviation / (0.02 * D**0.5) < 2
    assert not any(t.any() for t in (head.codebook_bias, head.hidden_mean, head.fold_direction))


def test_the_seed_decides():
    one, same, other = (make_head(CODES["sign"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.codes, same.codes)
    assert not torch.equal(one.codes, other.codes)


def test_names_in_the_state_dict(head):
    names = {"codebook", "codebook_bias", "codes", "hidden_mean", "fold_direction"}
    names |= {"fine_codes", "fine_ids"} if head.num_fine_tokens else set()
    assert set(head.state_dict()) == names
    assert {n for n, _ in head.named_parameters()} == {"codebook", "codebook_bias"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_compute_the_same(head, copied, hidden):
    twin = copied(head)
    assert torch.equal(twin(hidden), head(hidden))
    twin.codes.zero_()
    assert head.codes.any() or head.codebook_size == 1


@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("fields", CODES.values(), ids=CODES.keys())
def test_the_loss_may_be_the_squared_hinge(fields, after, hidden):
    head = make_head(fields, **after)
    labels = torch.arange(10).view(2, 5)
    labels[0, 0] = -100
    logits = reference_logits(head, hidden)
    signs = torch.where(labels[..., None] == torch.arange(V), 1.0, -1.0)
    losses = torch.clamp(1 - signs * logits, min=0).square().sum(-1)
    losses[0, 0] = 0
    got = head(hidden, labels, output_loss="squared_hinge", reduction="none")
    assert got.shape == (2, 5)
    torch.testing.assert_close(got.double(), losses, atol=1e-2, rtol=1e-2)
    got = head(hidden, labels, output_loss="squared_hinge")
    torch.testing.assert_close(got.double(), losses.sum() / 9, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_loss": "hinge"}, "`output_loss` must be one of .* got 'hinge'"),
        ({"output_loss": "squared_hinge", "z_loss": 0.5}, "both must be 0, got 0.0 and 0.5"),
        ({"output_loss": "squared_hinge", "label_smoothing": 0.1}, "must be 0, got 0.1 and 0.0"),
    ],
)
def test_options_that_are_none_of_the_loss_are_refused(hidden, options, message):
    head = make_head(CODES["sign"])
    with pytest.raises(ValueError, match=message):
        head(hidden, torch.arange(10).view(2, 5), **options)


@pytest.mark.parametrize("with_labels", [False, True])
def test_compiled_without_breaks(head, hidden, with_labels):
    torch.compiler.reset()  # the other heads count as recompilations of this one
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    arguments = (hidden, torch.arange(10).view(2, 5)) if with_labels else (hidden,)
    outputs = compiled(*arguments)
    outputs.sum().backward()
    gradient = head.codebook.grad.clone()
    head.zero_grad()
    wanted = head(*arguments)
    wanted.sum().backward()
    torch.testing.assert_close(outputs, wanted, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(gradient, head.codebook.grad, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_leave_the_codes_alone(head, dtype, hidden):
    wanted = reference_logits(head, hidden)
    codes = head.codes.clone()
    head.to(dtype)
    assert torch.equal(head.codes, codes)
    assert head.codes.dtype == codes.dtype
    logits = head(hidden.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), wanted, atol=0.15, rtol=0.05)


def test_meta_device_costs_nothing():
    with torch.device("meta"):
        head = VQLogitsHead(
            SimpleNamespace(
                **CODES["sign"],
                vocab_size=10**9,
                hidden_size=10**5,
                num_fine_tokens=10**6,
                nested_codebooks=[],
                logit_scale=1.0,
                final_logit_softcapping=None,
            )
        )
    assert head.codes.is_meta
    assert head.codebook.is_meta


@pytest.mark.parametrize("name", ["sign", "sign, one bit"])
def test_padding_bits_are_found(name):
    head = make_head(CODES[name])
    head.codes[5, -1] |= 128
    with pytest.raises(ValueError, match="sets bits above the .* of `num_codebooks`.* row 5"):
        head.check_codes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.fine_codes[2, -1].bitwise_or_(128), "`fine_codes` sets bits .* row 2"),
        (lambda head: head.fine_ids[4:5].fill_(V), f"`fine_ids` holds {V}, but must name 30"),
        (lambda head: head.fine_ids[4:5].fill_(-1), "`fine_ids` holds -1, but must name 30"),
        (lambda head: head.fine_ids[4:5].fill_(7), "`fine_ids` is not in ascending order"),
    ],
)
def test_impossible_second_codes_are_found(change, message):
    head = make_head(CODES["sign, second codes"])
    head.check_codes()
    change(head)
    with pytest.raises(ValueError, match=message):
        head.check_codes()


@pytest.mark.parametrize(("size", "kept"), [(V, 30), (20, 20), (1, 1)])
def test_a_smaller_vocabulary_drops_second_codes(size, kept):
    head = make_head(CODES["sign, second codes"])
    head.fine_ids.copy_(head.fine_ids.flip(0))
    before = dict(zip(head.fine_ids.tolist(), head.fine_codes.tolist(), strict=True))
    head.set_codes(head.codes[:size])
    assert head.out_features == size
    assert head.num_fine_tokens == kept
    after = zip(head.fine_ids.tolist(), head.fine_codes.tolist(), strict=True)
    assert all(before[token] == code for token, code in after)


def test_a_smaller_vocabulary_may_have_no_second_codes():
    head = make_head(CODES["sign, second codes"])
    head.fine_ids += 100
    head.set_codes(head.codes[:50])
    assert head.fine_ids is None
    assert "fine_codes" not in head.state_dict()


@pytest.mark.parametrize("name", ["index, G = 1", "index, int32"])
@pytest.mark.parametrize("excess", [0, 3])
def test_indices_out_of_range_are_found(name, excess):
    head = make_head(CODES[name])
    wrong = head.codebook_size + excess
    head.codes[4, -1] = wrong
    with pytest.raises(ValueError, match=f"token 4 names codeword {wrong} .*`codebook_size` is"):
        head.check_codes()


def test_negative_indices_are_found():
    head = make_head(CODES["index, int32"])
    head.codes[4, 1] = -1
    with pytest.raises(ValueError, match="token 4 names codeword -1 of codebook 1"):
        head.check_codes()


def test_storage_counts_every_byte():
    sizes = make_head(CODES["sign"]).storage()
    assert sizes["bits_per_token"] == 19
    assert sizes["bits_per_weight"] == 19 / D
    assert sizes["float_parameters"] == 19 * (D + 1)
    assert sizes["codes_bytes"] == 3 * V
    assert sizes["total_bytes"] == 3 * V + 4 * 19 * (D + 1)
    fine = make_head(CODES["sign, second codes"]).storage()
    assert fine["bits_per_token"] == pytest.approx(19 * (1 + 30 / V))
    assert fine["codes_bytes"] == 3 * V + 3 * 30 + 4 * 30
    assert fine["codebook_bytes"] == sizes["codebook_bytes"]
    assert make_head(CODES["index, uint8"]).storage()["bits_per_token"] == 3 * 8
    assert make_head(CODES["index, int32"]).storage()["codes_bytes"] == 2 * 4 * V
    assert make_head(CODES["sign"]).bfloat16().storage()["codebook_bytes"] == 2 * 19 * (D + 1)


NESTED = {"nested_codebooks": [5, 16, 23], "num_codebooks": 43}
NESTED_CODES = {"one code": {}, "second codes": {"num_fine_tokens": 30}}


@pytest.fixture(params=NESTED_CODES.values(), ids=NESTED_CODES.keys())
def nested_head(request) -> VQLogitsHead:
    head = make_head(CODES["sign"] | NESTED | request.param)
    for bits in head.nested_codebooks:
        getattr(head, f"codebook_{bits}").normal_()
        getattr(head, f"codebook_bias_{bits}").normal_()
    return head


def logits_of_first_bits(head, bits, hidden):
    """Logits of the smaller head inside, in float64 and written out plainly."""
    codebook, bias = (getattr(head, f"{n}_{bits}").double() for n in ("codebook", "codebook_bias"))
    shifts = torch.arange(bits)
    levels = ((head.codes[:, shifts // 8] >> (shifts % 8)) & 1) * 2.0 - 1.0
    if head.fine_ids is not None:
        fine = (head.fine_codes[:, shifts // 8] >> (shifts % 8)) & 1
        levels[head.fine_ids.long()] += fine - 0.5
    scores = (hidden.double() @ codebook.T + bias) * 2.0 ** -round(math.log2(bits))
    return scores @ levels.double().T


@pytest.mark.parametrize("bits", [5, 16, 23])
def test_a_smaller_head_inside(nested_head, bits, hidden):
    wanted = logits_of_first_bits(nested_head, bits, hidden)
    smaller = [b for b in (5, 16, 23) if b < bits]
    kept = {b: getattr(nested_head, f"codebook_{b}").clone() for b in smaller}
    nested_head.codebook.requires_grad_(False)
    nested_head.keep_codebooks(bits)
    nested_head.check_codes()
    assert not nested_head.codebook.requires_grad
    assert nested_head.codebook_bias.requires_grad
    assert nested_head.codes.shape == (V, -(-bits // 8))
    built = make_head(
        CODES["sign"] | {"num_codebooks": bits, "nested_codebooks": smaller},
        num_fine_tokens=nested_head.num_fine_tokens,
    )
    built.load_state_dict(nested_head.state_dict())
    assert vars(built).keys() == vars(nested_head).keys()
    assert built.score_scale == nested_head.score_scale
    assert repr(built) == repr(nested_head)
    assert torch.equal(built(hidden), nested_head(hidden))
    torch.testing.assert_close(nested_head.double()(hidden.double()), wanted)
    for inside, codebook in kept.items():
        assert torch.equal(getattr(nested_head, f"codebook_{inside}"), codebook.double())


def test_cutting_by_way_of_another_size_is_the_same(nested_head, hidden):
    direct = copy.deepcopy(nested_head)
    direct.keep_codebooks(5)
    for bits in (43, 23, 16, 5):
        nested_head.keep_codebooks(bits)
    assert torch.equal(direct(hidden), nested_head(hidden))
    assert direct.state_dict().keys() == nested_head.state_dict().keys()
    with pytest.raises(
        ValueError, match="`num_codebooks` 16 is not stored: there is 5 alone in th"
    ):
        direct.keep_codebooks(16)


def test_smaller_heads_take_no_part_in_the_whole_one(nested_head, hidden):
    plain = make_head(
        CODES["sign"] | {"num_codebooks": 43, "num_fine_tokens": nested_head.num_fine_tokens}
    )
    plain.load_state_dict(nested_head.state_dict(), strict=False)
    assert torch.equal(plain(hidden), nested_head(hidden))
    nested = {name for name, _ in nested_head.named_buffers()} - dict(plain.named_buffers()).keys()
    assert nested == {f"{n}_{b}" for n in ("codebook", "codebook_bias") for b in (5, 16, 23)}
    assert nested_head.storage()["nested_bytes"] == 4 * (5 + 16 + 23) * (D + 1)
    stored = [t for n, t in nested_head.state_dict().items() if n not in STATISTICS]
    assert nested_head.storage()["total_bytes"] == sum(t.nbytes for t in stored)
    nested_head.bfloat16()
    assert all(getattr(nested_head, name).dtype == torch.bfloat16 for name in nested)


def test_heads_of_several_sizes_are_joined(nested_head, hidden):
    small = copy.deepcopy(nested_head)
    small.keep_codebooks(16)
    wanted = small(hidden)
    joined = make_head(
        CODES["sign"] | {"num_codebooks": 43, "nested_codebooks": [16]},
        num_fine_tokens=nested_head.num_fine_tokens,
    )
    joined.load_state_dict(nested_head.state_dict(), strict=False)
    joined.codebook_16.zero_()
    joined.hold(small)
    joined.keep_codebooks(16)
    assert torch.equal(joined(hidden), wanted)


def test_a_smaller_head_that_is_not_inside(nested_head):
    small = copy.deepcopy(nested_head)
    small.keep_codebooks(5)
    other = copy.deepcopy(small)
    name = "codes" if small.fine_codes is None else "fine_codes"
    getattr(other, name)[7, 0] ^= 1
    with pytest.raises(ValueError, match="smaller head are not the first 5 bits of this one's"):
        nested_head.hold(other)
    with pytest.raises(ValueError, match=r"smaller one of 5 bits: `nested_codebooks` is \[\]"):
        small.hold(other)


def test_a_smaller_head_whose_second_codes_are_other_tokens():
    head = make_head(CODES["sign"] | NESTED, num_fine_tokens=30)
    small = copy.deepcopy(head)
    small.keep_codebooks(5)
    head.hold(small)
    moved, without = copy.deepcopy(small), copy.deepcopy(small)
    moved.fine_ids = moved.fine_ids + 1
    without.fine_ids = without.fine_codes = None
    for other in (moved, without):
        with pytest.raises(ValueError, match="smaller head are not the first 5 bits of this one"):
            head.hold(other)


def test_random_nested_heads_have_logits_like_a_dense_layers():
    head = make_head(CODES["sign"] | NESTED)
    head.keep_codebooks(23)
    deviation = float(head(torch.randn(4000, D)).detach().std())
    assert 0.4 < deviation / (0.02 * D**0.5) < 2


def test_prints_its_sizes():
    assert repr(make_head(CODES["sign"] | NESTED)).endswith("nested_codebooks=[5, 16, 23])")
    assert "out_features=300, code_type=index, num_codebooks=3, codebook_size=256" in repr(
        make_head(CODES["index, uint8"])
    )


@pytest.mark.parametrize("codes", ["sign", "index"])
def test_the_largest_logits(codes, make_model):
    head = make_model(code_type=codes, codebook_size=2 if codes == "sign" else 5).lm_head
    head.logit_scale, head.final_logit_softcapping = 0.5, 3.0
    hidden = 4 * torch.randn(2, 3, head.in_features)
    logits = head(hidden)
    values, tokens = head.topk(hidden, 4)
    assert values.shape == tokens.shape == (2, 3, 4)
    torch.testing.assert_close(values, logits.topk(4).values, atol=2e-2, rtol=0)
    torch.testing.assert_close(values, logits.gather(-1, tokens), atol=2e-2, rtol=0)
    assert torch.equal(head.argmax(hidden), tokens[..., 0])
    with pytest.raises(ValueError, match="must end in the hidden size"):
        head.argmax(hidden[..., 1:])

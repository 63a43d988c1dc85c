import numpy as np
import pytest
import torch
from torch.nn.functional import embedding

from hf_vqlogits import ops
from hf_vqlogits.ops import eager

V, D = 37, 12


def example(terms, dtype=torch.float64):
    generator = torch.Generator().manual_seed(terms)
    signs = torch.randint(0, 2, (V, terms), generator=generator) * 2 - 1
    codebook = torch.randn(terms, D, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, V, (3, 5), generator=generator)
    return ops.pack_signs(signs), ids, codebook.to(dtype)


def table(codes, codebook, scale):
    """The rows (V, d) in float64, written out."""
    bits = np.unpackbits(codes.numpy(), axis=1, count=len(codebook), bitorder="little")
    return scale * torch.from_numpy(bits * 2.0 - 1.0) @ codebook.double()


@pytest.mark.parametrize("terms", [1, 7, 8, 19, 300])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_rows_against_the_table(terms, dtype, error):
    codes, ids, codebook = example(terms, dtype)
    rows = ops.gather_rows(codes, ids, codebook, 0.25)
    wanted = embedding(ids, table(codes, codebook, 0.25))
    assert rows.dtype == dtype
    assert rows.shape == (3, 5, D)
    assert (rows.double() - wanted).abs().max() <= error * wanted.abs().max()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_rows_with_second_codes_against_the_table(dtype, error):
    codes, ids, codebook = example(19, dtype)
    fine_ids = torch.tensor([0, 3, 17, 30, 36], dtype=torch.int32)
    fine = {"fine_ids": fine_ids, "fine_codes": codes[5:10]}
    ids = torch.cat([ids.flatten(), fine_ids.long()])
    rows = ops.gather_rows(codes, ids, codebook, 0.25, **fine)
    whole = table(codes, codebook, 0.25)
    whole[fine_ids.long()] += table(codes[5:10], codebook, 0.125)
    wanted = embedding(ids, whole)
    assert rows.dtype == dtype
    assert (rows.double() - wanted).abs().max() <= error * wanted.abs().max()
    if dtype == torch.float64:
        codebook.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda words: ops.gather_rows(codes, ids, words, 0.25, **fine), codebook
        )


def test_large_sums_do_not_overflow_float16():
    codes = ops.pack_signs(torch.ones(2, 64))
    codebook = torch.full((64, 3), 4096.0, dtype=torch.float16)
    rows = ops.gather_rows(codes, torch.tensor([1]), codebook, 1 / 64)
    assert torch.equal(rows, torch.full((1, 3), 4096.0, dtype=torch.float16))


@pytest.mark.parametrize("ids", [torch.empty(0, dtype=torch.long), torch.tensor(3)])
def test_shapes_of_the_tokens_are_kept(ids):
    codes, _, codebook = example(9)
    assert ops.gather_rows(codes, ids, codebook).shape == (*ids.shape, D)
    assert ops.gather_rows(codes, ids.int(), codebook).shape == (*ids.shape, D)


def test_gradients():
    codes, ids, codebook = example(9)
    codebook.requires_grad_()

    def rows(words):
        return ops.gather_rows(codes, ids, words, 0.5)

    assert torch.autograd.gradcheck(rows, codebook)
    assert torch.autograd.gradgradcheck(lambda words: rows(words).square(), codebook)


def test_gradients_in_half_precision_are_summed_in_float32():
    codes, _, codebook = example(19, torch.bfloat16)
    codebook.requires_grad_()
    ids = torch.zeros(4096, dtype=torch.long)  # bfloat16 counts no further than 256
    ops.gather_rows(codes, ids, codebook).sum().backward()
    assert torch.equal(codebook.grad.abs(), torch.full_like(codebook, 4096.0))


def test_many_tokens_go_in_pieces(monkeypatch):
    codes, ids, codebook = example(19)
    codebook.requires_grad_()
    whole = ops.gather_rows(codes, ids, codebook)
    (wanted,) = torch.autograd.grad(whole.square().sum(), codebook)
    monkeypatch.setattr(eager, "_PIECE_BYTES", 19 * 8 * 4)
    pieces = ops.gather_rows(codes, ids, codebook)
    (gradient,) = torch.autograd.grad(pieces.square().sum(), codebook)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(gradient, wanted)


def test_autocast_leaves_the_type_alone():
    codes, ids, codebook = example(19, torch.float32)
    wanted = ops.gather_rows(codes, ids, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.gather_rows(codes, ids, codebook), wanted)


@pytest.mark.parametrize("ids", [[V], [-1]])
def test_tokens_outside_the_vocabulary(ids):
    codes, _, codebook = example(9)
    with pytest.raises(IndexError, match="out of range"):
        ops.gather_rows(codes, torch.tensor(ids), codebook)


def test_what_does_not_fit_is_named():
    codes, ids, codebook = example(19)
    with pytest.raises(TypeError, match="`codes` is torch.int32; sign codes must be uint8"):
        ops.gather_rows(codes.int(), ids, codebook)
    with pytest.raises(TypeError, match="`ids` is torch.float32; tokens must be int64 or int32"):
        ops.gather_rows(codes, ids.float(), codebook)
    with pytest.raises(ValueError, match=r"shape \(37, 3\).*\(9, 12\) takes .* shape \(V, 2\)"):
        ops.gather_rows(codes, ids, codebook[:9])


def test_registered_operations_keep_their_promises():
    codes, ids, codebook = example(9, torch.float32)
    arguments = (codes, ids.flatten(), codebook.requires_grad_(), 0.5, None, None)
    torch.library.opcheck(torch.ops.vqlogits.gather_rows.default, arguments)
    grad = torch.randn(15, D, requires_grad=True)
    arguments = (grad, codes, ids.flatten(), 9, 0.5, None, None)
    torch.library.opcheck(torch.ops.vqlogits.gather_rows_backward.default, arguments)


FINE_IDS = torch.tensor([0, 3, 17, 30, 36], dtype=torch.int32)


def fine_example(terms, dtype=torch.float64):
    codes, ids, codebook = example(terms, dtype)
    ids = torch.cat([ids.flatten(), FINE_IDS.long()])
    return codes, ids, codebook, {"fine_ids": FINE_IDS, "fine_codes": codes[5:10]}


def test_gradients_with_second_codes():
    codes, ids, codebook, fine = fine_example(9)
    codebook.requires_grad_()

    def rows(words):
        return ops.gather_rows(codes, ids, words, 0.5, **fine)

    assert torch.autograd.gradcheck(rows, codebook)
    assert torch.autograd.gradgradcheck(lambda words: rows(words).square(), codebook)


def test_rows_with_second_codes_are_rounded_once():
    codes, ids, codebook, fine = fine_example(300, torch.bfloat16)
    exact = ops.gather_rows(codes, ids, codebook.double(), 1 / 256, **fine)
    rows = ops.gather_rows(codes, ids, codebook, 1 / 256, **fine).double()
    half_a_digit = torch.finfo(torch.bfloat16).eps / 2
    assert ((rows - exact).abs() <= 1.01 * half_a_digit * exact.abs() + 1e-6).all()


def test_many_tokens_with_second_codes_go_in_pieces(monkeypatch):
    codes, ids, codebook, fine = fine_example(19)
    codebook.requires_grad_()
    whole = ops.gather_rows(codes, ids, codebook, **fine)
    (wanted,) = torch.autograd.grad(whole.square().sum(), codebook)
    monkeypatch.setattr(eager, "_PIECE_BYTES", 19 * 8 * 4)
    pieces = ops.gather_rows(codes, ids, codebook, **fine)
    (gradient,) = torch.autograd.grad(pieces.square().sum(), codebook)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(gradient, wanted)


def test_second_codes_of_no_token_change_nothing():
    codes, ids, codebook, fine = fine_example(19)
    none = {name: tensor[:0] for name, tensor in fine.items()}
    rows = ops.gather_rows(codes, ids, codebook)
    assert torch.equal(ops.gather_rows(codes, ids, codebook, **none), rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fine_codes": None}, ValueError, "go together; give both or none"),
        ({"fine_ids": FINE_IDS[:2]}, ValueError, r"must be \(F,\) and \(F, 3\)"),
        ({"fine_ids": FINE_IDS.float()}, TypeError, "`fine_ids` torch.float32"),
    ],
)
def test_second_codes_that_do_not_fit_are_named(change, error, message):
    codes, ids, codebook, fine = fine_example(19)
    with pytest.raises(error, match=message):
        ops.gather_rows(codes, ids, codebook, **(fine | change))


def test_registered_operations_keep_their_promises_with_second_codes():
    codes, ids, codebook, fine = fine_example(9, torch.float32)
    arguments = (codes, ids, codebook.requires_grad_(), 0.5, *fine.values())
    torch.library.opcheck(torch.ops.vqlogits.gather_rows.default, arguments)
    grad = torch.randn(len(ids), D, requires_grad=True)
    arguments = (grad, codes, ids, 9, 0.5, *fine.values())
    torch.library.opcheck(torch.ops.vqlogits.gather_rows_backward.default, arguments)

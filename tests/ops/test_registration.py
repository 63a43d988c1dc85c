import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu

CASES = {
    "sign": ((4, 37), references.random_sign_codes(301, 37)),
    "index": ((4, 3, 5), references.random_index_codes(301, 3, 5)),
}
each_case = pytest.mark.parametrize("code_type", CASES)
FORCED = ("eager", "matmul", *cpu.paths())


def case(code_type, dtype=torch.float64):
    shape, codes = CASES[code_type]
    return references.random_scores(*shape).to(dtype), codes


@each_case
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pytorch_accepts_the_registration(code_type, requires_grad):
    scores, codes = case(code_type)
    scores.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.vqlogits.expand.default, (scores, codes, code_type))
    grad = references.random_scores(4, 301).double().requires_grad_(requires_grad)
    arguments = (grad, codes, code_type, list(scores.shape))
    torch.library.opcheck(torch.ops.vqlogits.expand_backward.default, arguments)


@each_case
@pytest.mark.parametrize("backend", ["eager", "matmul"])
def test_gradients_of_both_orders(code_type, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(code_type)
    scores.requires_grad_()
    codes = codes[:20]

    def function(scores):
        return ops.expand(scores, codes, code_type=code_type).square()

    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


@each_case
@pytest.mark.parametrize("backend", FORCED)
def test_every_backend_gives_the_same_gradient(code_type, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(code_type, torch.float32)
    grad = references.random_scores(4, 301)
    exact = scores.double().requires_grad_()
    references.logits(exact, codes, code_type).backward(grad.double())
    scores.requires_grad_()
    ops.expand(scores, codes, code_type=code_type).backward(grad)
    torch.testing.assert_close(scores.grad, exact.grad.float(), atol=1e-4, rtol=1e-4)


@each_case
@pytest.mark.parametrize("backend", FORCED)
def test_autocast_leaves_the_type_of_the_scores(code_type, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(code_type, torch.float32)
    want = ops.expand(scores, codes, code_type=code_type)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.expand(scores, codes, code_type=code_type)
        half = ops.expand(scores.bfloat16(), codes, code_type=code_type)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert half.dtype == torch.bfloat16


@each_case
def test_compilation_without_graph_breaks(code_type):
    scores, codes = case(code_type, torch.float32)

    def function(scores):
        return ops.expand(2 * scores, codes, code_type=code_type).relu()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (4, 2, 3):
        eager, traced = (scores[:rows].clone().requires_grad_() for _ in range(2))
        want, got = function(eager), compiled(traced)
        assert torch.equal(got, want)
        want.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(traced.grad, eager.grad)


@each_case
def test_shapes_without_data(code_type):
    scores, codes = case(code_type, torch.bfloat16)
    logits = ops.expand(scores.to("meta"), codes.to("meta"), code_type=code_type)
    assert logits.is_meta
    assert logits.shape == (4, 301)
    assert logits.dtype == torch.bfloat16


@each_case
def test_no_rows_and_no_tokens(code_type):
    scores, codes = case(code_type, torch.float32)
    assert ops.expand(scores[:0], codes, code_type=code_type).shape == (0, 301)
    assert ops.expand(scores, codes[:0], code_type=code_type).shape == (4, 0)


SIGN_CODES, INDEX_CODES = CASES["sign"][1], CASES["index"][1]


@pytest.mark.parametrize(
    ("scores", "codes", "code_type", "error", "message"),
    [
        (torch.ones(4, 37), SIGN_CODES, "bits", ValueError, "`code_type` is 'bits'; .* or index"),
        (torch.ones(37), SIGN_CODES, "sign", ValueError, r"shape \(37,\), but sign codes take"),
        (torch.ones(1, 4, 37), SIGN_CODES, "sign", ValueError, r"take \(N, R\).* flatten"),
        (torch.ones(4, 15), INDEX_CODES, "index", ValueError, r"index codes take \(N, G, K\)"),
        (torch.ones(4, 3, 0), INDEX_CODES, "index", ValueError, "with G, K >= 1"),
        (torch.ones(4, 41), SIGN_CODES, "sign", ValueError, r"take sign codes of shape \(V, 6\)"),
        (torch.ones(4, 2, 5), INDEX_CODES, "index", ValueError, r"codes of shape \(V, 2\)"),
        (torch.ones(4, 37), SIGN_CODES[0], "sign", ValueError, r"`codes` has shape \(5,\)"),
        (torch.ones(4, 37).int(), SIGN_CODES, "sign", TypeError, "`scores` is torch.int32"),
        (torch.ones(4, 37), SIGN_CODES.int(), "sign", TypeError, "sign codes must be uint8"),
        (torch.ones(4, 3, 5), INDEX_CODES.long(), "index", TypeError, "must be uint8 or int32"),
        (torch.ones(4, 37), SIGN_CODES.to("meta"), "sign", ValueError, "`scores` is on cpu but"),
    ],
)
def test_wrong_arguments_are_refused(scores, codes, code_type, error, message):
    with pytest.raises(error, match=message):
        ops.expand(scores, codes, code_type=code_type)

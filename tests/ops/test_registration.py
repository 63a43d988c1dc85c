import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, triton_backend

SIGN_CODES = references.random_sign_codes(301, 37)
INDEX_CODES = references.random_index_codes(301, 3, 5)
FINE_IDS = torch.tensor([18, 0, 7], dtype=torch.int32)
FINE_CODES = references.random_sign_codes(3, 37, seed=1)
NO_FINE = {"fine_ids": None, "fine_codes": None}
FINE = {"fine_ids": FINE_IDS, "fine_codes": FINE_CODES}
CASES = {
    "sign": ((4, 37), {"codes": SIGN_CODES, "code_type": "sign", **NO_FINE}),
    "fine": ((4, 37), {"codes": SIGN_CODES, "code_type": "sign", **FINE}),
    "index": ((4, 3, 5), {"codes": INDEX_CODES, "code_type": "index", **NO_FINE}),
}
each_case = pytest.mark.parametrize("name", CASES)
FORCED = ("eager", "matmul", *cpu.paths())
INTERPRETED = ("triton",) if triton_backend.usable(torch.device("cpu")) else ()
each_case_and_backend = pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for backend in FORCED + INTERPRETED
        for name in CASES
        if (name, backend) != ("index", "amx")
    ],
)


def case(name, dtype=torch.float64):
    """Scores, and the codes as the operations take them."""
    shape, codes = CASES[name]
    return references.random_scores(*shape).to(dtype), codes


@each_case
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", *INTERPRETED])
def test_pytorch_accepts_the_registration(name, requires_grad, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(name, torch.float32 if backend == "triton" else torch.float64)
    scores.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.vqlogits.expand.default, (scores, *codes.values()))
    grad = references.random_scores(4, 301).to(scores.dtype).requires_grad_(requires_grad)
    arguments = (grad, *codes.values(), list(scores.shape))
    torch.library.opcheck(torch.ops.vqlogits.expand_backward.default, arguments)


@each_case
@pytest.mark.parametrize("backend", ["eager", "matmul"])
def test_gradients_of_both_orders(name, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(name)
    scores.requires_grad_()
    codes = codes | {"codes": codes["codes"][:20]}

    def function(scores):
        return ops.expand(scores, **codes).square()

    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


@each_case_and_backend
def test_every_backend_gives_the_same_gradient(name, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(name, torch.float32)
    grad = references.random_scores(4, 301)
    exact = scores.double().requires_grad_()
    references.logits(exact, **codes).backward(grad.double())
    scores.requires_grad_()
    ops.expand(scores, **codes).backward(grad)
    torch.testing.assert_close(scores.grad, exact.grad.float(), atol=1e-4, rtol=1e-4)


@each_case_and_backend
def test_autocast_leaves_the_type_of_the_scores(name, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(name, torch.float32)
    want = ops.expand(scores, **codes)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.expand(scores, **codes)
        half = ops.expand(scores.bfloat16(), **codes)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert half.dtype == torch.bfloat16


@each_case
@pytest.mark.parametrize("backend", ["auto", *INTERPRETED])
def test_compilation_without_graph_breaks(name, backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case(name, torch.float32)

    def function(scores):
        return ops.expand(2 * scores, **codes).relu()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (4, 2, 3):
        eager, traced = (scores[:rows].clone().requires_grad_() for _ in range(2))
        want, got = function(eager), compiled(traced)
        assert torch.equal(got, want)
        want.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(traced.grad, eager.grad)


@each_case
def test_export_sees_one_operation(name):
    scores, codes = case(name, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, scores):
            return ops.expand(scores, **codes)

    program = torch.export.export(Layer(), (scores,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.vqlogits.expand.default]
    torch.testing.assert_close(program.module()(scores), ops.expand(scores, **codes))


@each_case
def test_shapes_without_data(name):
    scores, codes = case(name, torch.bfloat16)
    there = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in codes.items()}
    logits = ops.expand(scores.to("meta"), **there)
    assert logits.is_meta
    assert logits.shape == (4, 301)
    assert logits.dtype == torch.bfloat16


@each_case
def test_no_rows_and_no_tokens(name):
    scores, codes = case(name, torch.float32)
    assert ops.expand(scores[:0], **codes).shape == (0, 301)
    none = codes | {"codes": codes["codes"][:0]}
    if name == "fine":
        none |= {"fine_ids": FINE_IDS[:0], "fine_codes": FINE_CODES[:0]}
    assert ops.expand(scores, **none).shape == (4, 0)


@pytest.mark.parametrize("backend", FORCED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_codes_are_added_before_the_sum_is_rounded(backend, dtype, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    scores, codes = case("fine", dtype)
    logits = ops.expand(scores, **codes)
    assert logits.dtype == dtype
    want = references.logits(scores, **codes)
    table_error = 0.01 * float(want.std()) if backend in cpu.LARGEST_CODEBOOKS else 1e-5
    allowed = table_error + torch.finfo(dtype).eps / 2 * want.abs()
    assert bool(((logits.double() - want).abs() <= allowed).all())


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


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"fine_ids": None}, ValueError, "go together; give both or none"),
        ({"fine_codes": FINE_CODES[:2]}, ValueError, r"must be \(F,\) and \(F, 5\)"),
        ({"fine_ids": FINE_IDS[:, None]}, ValueError, r"`fine_ids` has shape \(3, 1\)"),
        ({"fine_codes": FINE_CODES.int()}, TypeError, "`fine_codes` is torch.int32"),
        ({"fine_ids": FINE_IDS.float()}, TypeError, "`fine_ids` torch.float32"),
        ({"fine_codes": FINE_CODES.to("meta")}, ValueError, "`fine_codes` is on meta but `codes`"),
    ],
)
def test_wrong_second_codes_are_refused(changed, error, message):
    scores, codes = case("fine")
    with pytest.raises(error, match=message):
        ops.expand(scores, **codes | changed)


def test_index_codes_have_no_second_codes():
    scores, codes = case("index")
    with pytest.raises(ValueError, match="go with sign codes only"):
        ops.expand(scores, **codes | FINE)

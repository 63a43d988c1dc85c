import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import pair_cross_entropy, row_losses

V, K, D, N = 90, 6, 5, 11
CODES = references.random_index_codes(V, 2, K)


@pytest.fixture(autouse=True)
def exact_logits(monkeypatch):
    """The kernel would round them to 16 bits."""
    monkeypatch.setenv("VQLOGITS_BACKEND", "eager")


def problem(dtype=torch.float32, spread=1.0):
    torch.manual_seed(0)
    head = {
        "codebook": (spread * torch.randn(2, K, D)).to(dtype).requires_grad_(),
        "codebook_bias": torch.randn(2, K).to(dtype).requires_grad_(),
        "codes": CODES,
        "code_type": "index",
    }
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    return hidden, torch.randint(0, V, (N,)), head


def losses_and_gradients(hidden, labels, head, **options):
    loss = ops.linear_cross_entropy(hidden, labels, **head, reduction="none", **options)
    leaves = (hidden, head["codebook"], head["codebook_bias"])
    return loss, *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "logit_scale": 0.5, "z_loss": 0.1}], ids=["", "all"]
)
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_no_logits_are_made_and_the_loss_is_theirs(options, at_once, monkeypatch):
    by_logits = problem()
    with monkeypatch.context() as patch:
        patch.setattr(pair_cross_entropy, "pays", lambda *_: False)
        wanted = losses_and_gradients(*by_logits, **options)
    monkeypatch.setattr(pair_cross_entropy, "ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(row_losses, "compute_expand", None)
    for found, expected in zip(losses_and_gradients(*problem(), **options), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_sums_vanish_are_computed_from_their_logits(dtype):
    """No token has the best codewords of both books, and all others lie e^-200 below."""
    codes = CODES.clone()
    codes[(codes[:, 0] == 2) & (codes[:, 1] == 3), 1] = 4
    scores = torch.zeros(4, 2, K)
    scores[1, 0, 2] = scores[1, 1, 3] = 200.0
    scores[2, 0, 2] = scores[2, 1, 3] = 40.0
    scores[3, 0, 2] = scores[3, 1, 3] = 100.0  # e^-100 is a float32 of four binary digits
    codebook = scores.permute(1, 2, 0).to(dtype).requires_grad_()
    head = {"codebook": codebook, "codebook_bias": torch.zeros(2, K, dtype=dtype)}
    labels, hidden = torch.tensor([3, 5, 7, 9]), torch.eye(4, dtype=dtype)
    loss = ops.linear_cross_entropy(
        hidden, labels, **head, codes=codes, code_type="index", reduction="none"
    )
    logits = references.logits(scores.double().requires_grad_(), codes, "index")
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    rough = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss.double(), wanted, rtol=rough, atol=rough)
    (gradient,) = torch.autograd.grad(loss.sum(), codebook)
    slope = torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, V)
    for book in range(2):
        expected = torch.zeros(4, K, dtype=torch.float64)
        expected.index_add_(1, codes[:, book].long(), slope.detach())
        found = gradient[book].T.double()
        torch.testing.assert_close(found, expected, rtol=rough, atol=rough)


def test_large_codebooks_and_soft_caps_go_the_other_way():
    scores = torch.zeros(1, 2, K)
    assert pair_cross_entropy.pays(scores, CODES, "index", None)
    assert not pair_cross_entropy.pays(scores, CODES, "index", 30.0)
    assert not pair_cross_entropy.pays(torch.zeros(1, 2, 50), CODES, "index", None)
    assert not pair_cross_entropy.pays(scores, CODES[:, :1], "index", None)
    assert not pair_cross_entropy.pays(torch.zeros(1, 16), CODES, "sign", None)


def test_a_code_of_no_codeword_is_refused():
    hidden, labels, head = problem()
    head["codes"] = CODES.clone()
    head["codes"][4, 1] = K
    with pytest.raises(IndexError, match=f"`codes` holds {K}, but the scores have {K} codewords"):
        ops.linear_cross_entropy(hidden, labels, **head)


def test_no_row_has_no_loss():
    hidden, _, head = problem()
    labels = torch.full((N,), -100)
    loss = ops.linear_cross_entropy(hidden, labels, **head, reduction="sum")
    assert float(loss) == 0

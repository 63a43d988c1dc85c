import pytest
import torch
from transformers import GPT2Config

from benchmarks import speed_peers as peers
from hf_vqlogits import VQLogitsConfig, VQLogitsHead

V, D, N = 4100, 128, 3


@pytest.fixture
def layers():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=D, bos_token_id=0, eos_token_id=0)
    head = VQLogitsHead(VQLogitsConfig(text_config=config, num_codebooks=64)).eval()
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    with torch.no_grad():
        exact = hidden @ torch.nn.functional.linear(torch.eye(D), weight)
        yield hidden, weight, head, exact, torch.nn.functional.linear(hidden, *head.to_linear())


def all_calls(hidden, weight, head):
    return (
        peers.dense(hidden, weight)
        | peers.integers(hidden, weight)
        | peers.torchao_int8(hidden, weight)
        | peers.other_backends(head, hidden, "plain", "eager", "matmul")
        | peers.adaptive_softmax(hidden, V)
        | peers.clustered_embedder(hidden, weight)
        | peers.fast_scan(hidden, weight, 64)
        | peers.best_tokens(head, hidden)
    )


def test_every_peer_computes_what_it_should(layers):
    hidden, weight, head, exact, head_exact = layers
    calls = all_calls(hidden, weight, head)
    errors = peers.check(calls, exact, head, head_exact)
    assert len(calls) == 12
    assert errors["dense_float32"] < 1e-5
    assert errors["quantised, eager"] < 1e-4
    assert 0.01 < errors[f"int4, groups of {peers.GROUP}"] < 1
    assert errors["int8"] < 0.1


@pytest.mark.parametrize(
    "name", ["dense_float32", "quantised, plain", "int8", "adaptive softmax", "the 64 best"]
)
def test_a_peer_that_computes_something_else_is_refused(layers, name):
    hidden, weight, head, exact, head_exact = layers
    call = next(c for n, c in all_calls(hidden, weight, head).items() if name in n)

    def wrong():
        found = call()
        if isinstance(found, tuple):
            return found[0], exact.argsort(1)[:, : peers.BEST]
        return found.flip(-1) + 1

    with pytest.raises(ValueError, match=f"{name}.* does not compute what it should"):
        peers.check({name: wrong}, exact, head, head_exact)


def test_the_backend_is_that_of_before_afterwards(layers, monkeypatch):
    hidden, _, head, _, _ = layers
    (call,) = peers.other_backends(head, hidden, "eager").values()
    for before in (None, "plain"):
        monkeypatch.delenv("VQLOGITS_BACKEND", raising=False)
        if before:
            monkeypatch.setenv("VQLOGITS_BACKEND", before)
        call()
        assert peers.os.environ.get("VQLOGITS_BACKEND") == before

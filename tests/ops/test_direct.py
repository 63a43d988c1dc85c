import pytest
import references
import torch
from torch import nn

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, direct

TABLE_PATHS = [path for path in cpu.paths() if path in cpu.SCORING_PATHS]
D = 37

pytestmark = pytest.mark.skipif(not TABLE_PATHS, reason="no kernel with tables in registers")
each_path = pytest.mark.parametrize("path", TABLE_PATHS)


def problem(rows=3, dtype=torch.float32, code_type="sign", vocabulary=700):
    """Arguments of `logits`; sign codes with second ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (100,) if code_type == "sign" else (40, 3)
    given = {
        "hidden": torch.randn(rows, D, generator=generator).to(dtype),
        "codebook": torch.randn(*shape, D, generator=generator).to(dtype),
        "codebook_bias": torch.randn(shape, generator=generator).to(dtype),
        "code_type": code_type,
        "scale": 2.0**-6,
    }
    if code_type == "index":
        return given | {"codes": references.random_index_codes(vocabulary, 40, 3)}
    fine_ids = torch.randperm(vocabulary, generator=generator)[:70].sort().values.int()
    return given | {
        "codes": references.random_sign_codes(vocabulary, 100),
        "fine_ids": fine_ids,
        "fine_codes": references.random_sign_codes(70, 100, seed=4),
    }


def exact(hidden, codebook, codebook_bias, codes, code_type, scale, **fine):
    """In float64, from the same numbers; scores and logits."""
    product = torch.einsum("nd,...d->n...", hidden.double(), codebook.double())
    scores = scale * (product + codebook_bias.double())
    return scores, references.logits(scores, codes, code_type, **fine)


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called for it."""
    made, original = [], cpu.logits

    def record(*arguments):
        made.append(arguments[6])
        return original(*arguments)

    monkeypatch.setattr(cpu, "logits", record)
    return made


@each_path
@pytest.mark.parametrize("rows", range(1, direct.LARGEST_ROWS + 1))
@pytest.mark.parametrize("code_type", ["sign", "index"])
def test_float32_is_within_the_error_of_the_tables(path, rows, code_type, calls, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, path)
    given = problem(rows, code_type=code_type)
    got = ops.logits(**given)
    assert calls == [path]
    scores, want = exact(**given)
    # 16-bit tables: half a scale each, which is at most the sum of all sizes over 32,675.
    tables = 50 if code_type == "sign" else 120
    bound = tables * scores.abs().flatten(1).sum(1, keepdim=True) / 32675
    assert got.shape == want.shape
    assert bool(((got - want).abs() <= bound).all())
    assert (got - want).std() < 2e-3 * want.std()


@each_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_logits_only(path, dtype, calls, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, path)
    given = problem(dtype=dtype)
    got = ops.logits(**given)
    assert got.dtype == dtype
    wide = {k: v.float() if v is not None and k in FLOATS else v for k, v in given.items()}
    assert torch.equal(got, ops.logits(**wide).to(dtype))
    assert calls == [path, path]


FLOATS = ("hidden", "codebook", "codebook_bias")


@each_path
def test_a_row_does_not_depend_on_the_others_nor_on_threads(path, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, path)
    given = problem(4, vocabulary=5000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = ops.logits(**given)
        torch.set_num_threads(3)
        for n in range(4):
            alone = ops.logits(**given | {"hidden": given["hidden"][n : n + 1]})
            assert torch.equal(alone[0], together[n])
    finally:
        torch.set_num_threads(threads)


@each_path
def test_strides_do_not_matter(path, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, path)
    given = problem()
    want = ops.logits(**given)
    strided = {
        name: given[name].repeat_interleave(2, -1)[..., ::2] for name in ("hidden", "codebook")
    }
    assert torch.equal(ops.logits(**given | strided), want)


@each_path
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite_spoil_their_own_row_only(path, value, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, path)
    given = problem()
    want = ops.logits(**given)
    given["hidden"][1, 5] = value
    got = ops.logits(**given)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert bool(got[1].isnan().all())


class Wrapped(torch.Tensor):
    """A subclass."""


def needs_gradient(given):
    return given | {"codebook": given["codebook"].clone().requires_grad_()}


@pytest.mark.parametrize(
    "change",
    [
        needs_gradient,
        lambda given: given | {"hidden": given["hidden"].repeat(9, 1)},
        lambda given: given | {"hidden": given["hidden"][:0]},
        lambda given: given | {"hidden": given["hidden"].as_subclass(Wrapped)},
        lambda given: given | {k: given[k].double() for k in FLOATS},
    ],
)
def test_otherwise_two_operations_do_it(change, calls):
    given = change(problem())
    got = ops.logits(**given)
    assert calls == []
    floats = {k: given[k].detach() for k in FLOATS}
    assert got.shape == (len(given["hidden"]), 700)
    want = exact(**given | floats)[1]
    torch.testing.assert_close(
        got.detach().double().as_subclass(torch.Tensor), want, atol=0.05, rtol=0.01
    )


def test_a_gradient_reaches_the_codebook():
    given = needs_gradient(problem())
    ops.logits(**given).sum().backward()
    assert float(given["codebook"].grad.abs().sum()) > 0
    with torch.no_grad():
        assert not ops.logits(**given).requires_grad


def test_autocast_and_other_backends_are_obeyed(calls, monkeypatch):
    given = problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.logits(**given).dtype == torch.bfloat16
    for backend in ("eager", "matmul", "plain"):
        monkeypatch.setenv(backends.VARIABLE, backend)
        torch.testing.assert_close(
            ops.logits(**given).double(), exact(**given)[1], atol=1e-4, rtol=1e-4
        )
    assert calls == []
    monkeypatch.setenv(backends.VARIABLE, "auto")
    parameters = {k: nn.Parameter(given[k]) for k in ("codebook", "codebook_bias")}
    with torch.no_grad():
        ops.logits(**given | parameters)
    assert calls == TABLE_PATHS[:1]


def test_compiled_whole(calls):
    given = problem()
    compiled = torch.compile(
        lambda hidden: ops.logits(**given | {"hidden": hidden}), fullgraph=True
    )
    got = compiled(given["hidden"])
    assert calls == []
    torch.testing.assert_close(got.double(), exact(**given)[1], atol=0.05, rtol=0.01)


def test_impossible_codes_are_refused():
    given = problem(code_type="index")
    given["codes"][3, 1] = 3
    with pytest.raises(IndexError, match="`codes` holds 3, but the scores have 3 codewords"):
        ops.logits(**given)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    "change",
    [
        {"codes": lambda codes: codes[:, :5]},
        {"codes": lambda codes: codes.long()},
        {"codes": lambda codes: codes.flatten()},
        {"fine_codes": lambda codes: codes[:, :5]},
        {"fine_codes": lambda codes: codes[:-1]},
        {"fine_codes": lambda codes: codes.int()},
        {"fine_codes": lambda codes: None},
        {"codebook": lambda words: words[:, :-1]},
        {"codebook": lambda words: words[:-1]},
        {"codebook_bias": lambda bias: bias[:-1]},
    ],
)
def test_what_does_not_go_together_is_refused(change, rows, calls):
    given = problem(rows=rows)
    ((name, edit),) = change.items()
    given[name] = edit(given[name])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.logits(**given)
    assert not calls


@pytest.mark.parametrize("rows", [1, 9])
def test_logits_in_another_type(rows, calls):
    given = problem(rows=rows, dtype=torch.bfloat16)
    got = ops.logits(**given, dtype=torch.float32)
    assert got.dtype == torch.float32
    assert bool((got != got.bfloat16()).any())
    torch.testing.assert_close(got.bfloat16(), ops.logits(**given), atol=1e-1, rtol=2e-2)
    assert len(calls) == (2 if rows == 1 else 0)

import itertools

import pytest
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, cpu_refining, refining

D, SCALE, CAP = 23, 0.5, 3.0
COMPILED = bool(cpu.paths())
TYPES = (torch.float32, torch.bfloat16, torch.float16)

each_way = pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "auto",
            marks=pytest.mark.skipif(not COMPILED, reason="the compiled library was not built"),
        ),
    ],
)


def problem(rows=5, vocabulary=700, *, deviations=None, dtype=torch.float32, weight=torch.float32):
    """Arguments of `refine` but `top_k`: hidden states and logits in one type, the rest in one."""
    generator = torch.Generator().manual_seed(rows + vocabulary)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rule = None
    if deviations is not None:
        numbers = (normal(vocabulary).abs(), normal(D), normal(D).abs() + 1)
        rule = ops.Rule(deviations, *(tensor.to(weight) for tensor in numbers))
    layer = (normal(vocabulary, D).to(weight), normal(vocabulary).to(weight))
    return {
        "hidden": normal(rows, D).to(dtype),
        "logits": (2 * normal(rows, vocabulary)).to(dtype),
        "dense": ops.Dense(*layer, SCALE, CAP),
        "offset": ops.Offset(normal(D).to(weight), normal(1).to(weight)),
        "rule": rule,
    }


def reference(hidden, logits, top_k, dense, offset, rule):
    """In float64, one position and candidate after the other; also how many are scored."""
    out, scored = logits.double().clone(), 0
    for row, h in zip(out, hidden.double(), strict=True):
        row -= h @ offset.common.double() + offset.bias.double()
        best = row.argsort(descending=True)[:top_k].tolist()
        given = row.clone()
        rho = 0.0
        if rule is not None:
            rho = float(((h - rule.mean) / rule.spread).square().mean().sqrt())
        for token in best:
            if rule is not None:
                deviation = rho * float(rule.error[[best[0], token]].double().norm())
                if given[best[0]] - given[token] > rule.deviations * deviation:
                    continue
            raw = dense.weight[token].double() @ h + dense.bias[token].double()
            row[token] = CAP * torch.tanh(SCALE * raw / CAP)
            scored += 1
    return out, scored


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled library was called."""
    made, original = [], cpu_refining.refine_

    def record(*arguments):
        made.append(len(arguments[0]))
        return original(*arguments)

    monkeypatch.setattr(cpu_refining, "refine_", record)
    return made


@each_way
@pytest.mark.parametrize(
    ("rows", "vocabulary", "top_k"),
    [
        (1, 5, 5),
        (1, 700, 1),
        (1, 49_152, 64),
        (5, 700, 17),
        (3, 701, 701),
        (70, 1500, 9),
        (0, 9, 2),
    ],
)
@pytest.mark.parametrize("deviations", [None, 0.0, 0.3])
@torch.no_grad()
def test_as_the_reference(backend, rows, vocabulary, top_k, deviations, calls, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    given = problem(rows, vocabulary, deviations=deviations)
    wanted, scored = reference(top_k=top_k, **given)
    if deviations is None:
        assert scored == rows * top_k
    elif rows and top_k > 5:
        assert rows <= scored < rows * top_k
    got = ops.refine(top_k=top_k, **given)
    assert calls == ([rows] if backend == "auto" else [])
    assert got.data_ptr() == given["logits"].data_ptr()  # in place
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not COMPILED, reason="the compiled library was not built")
@pytest.mark.parametrize(
    ("dtype", "weight"),
    list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)),
)
@torch.no_grad()
def test_half_precision_is_rounded_where_it_is_stored_and_nowhere_else(dtype, weight, calls):
    given, top_k = problem(dtype=dtype, weight=weight), 300
    offset, layer, h = given["offset"], given["dense"], given["hidden"].double()
    logits = given["logits"].double() - (h @ offset.common.double() + offset.bias)[:, None]
    shifted = logits.float().to(dtype)
    raw = (h @ layer.weight.double().T + layer.bias.double()).float().to(weight).double()
    dense = (CAP * torch.tanh(SCALE * raw / CAP)).float().to(dtype)
    got = ops.refine(top_k=top_k, **given)
    assert calls == [5]
    # A sum in float32 rounds otherwise only where it lies between two numbers of the type.
    kept = torch.isclose(got, shifted, rtol=1e-5, atol=1e-5)
    scored = torch.isclose(got, dense, rtol=1e-5, atol=1e-5)
    by_order = torch.zeros_like(kept).scatter_(1, shifted.float().topk(top_k).indices, True)
    assert float(kept[~by_order].float().mean()) > 0.98
    assert float(scored[by_order].float().mean()) > 0.98


@torch.no_grad()
def test_the_two_ways_agree_on_what_is_scored(monkeypatch):
    given = problem(40, 3000, deviations=0.5)
    given["dense"] = given["dense"]._replace(bias=torch.full((3000,), 1e3), softcap=None)
    found = []
    for backend in ("eager", "auto"):
        monkeypatch.setenv(backends.VARIABLE, backend)
        refined = ops.refine(top_k=30, **given | {"logits": given["logits"].clone()})
        found.append((refined > 100).nonzero())
    assert torch.equal(*found)


@pytest.mark.skipif(not COMPILED, reason="the compiled library was not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1e-7, 0.37, -3.1, 700.0, 65504.0, -5e5])
@torch.no_grad()
def test_all_numbers_of_a_type_are_read_and_rounded(dtype, offset, calls):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    given = problem(1, 2**16, dtype=dtype, deviations=0.0)
    given["logits"] = numbers[None].clone()
    given["offset"] = ops.Offset(torch.zeros(D), torch.tensor([offset]))
    got = ops.refine(top_k=1, **given)[0]
    assert calls == [1]
    wanted = (numbers.float() - offset).to(dtype)
    other = ~((got == wanted) | (got.isnan() & wanted.isnan()))
    assert int(other.sum()) <= 1  # the largest is the dense layer's
    values, tokens = cpu.largest(numbers[None], 2**16)
    found = torch.full_like(numbers, float("nan")).scatter(0, tokens[0], values[0])
    found[0] = numbers[0]  # which stands for what is no number too
    assert torch.equal(found.nan_to_num(nan=1.5), numbers.nan_to_num(nan=1.5))


@each_way
@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_nan_stays_nan_whatever_its_digits(backend, dtype, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    given = problem(3, 701)  # the last one alone, the others four at a time
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    given["hidden"][1] = all_ones
    given["logits"] = given["logits"].to(dtype)
    got = ops.refine(top_k=4, **given)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("deviations", [None, 1e9])
@torch.no_grad()
def test_a_row_with_fewer_numbers_than_candidates(dtype, deviations):
    given = problem(1, 9, deviations=deviations)
    given = given | {name: given[name].to(dtype) for name in ("hidden", "logits")}
    given["logits"][0, 1:] = float("nan")
    got = ops.refine(top_k=4, **given)
    assert got.isnan().tolist() == [[False] + [True] * 8]


@torch.no_grad()
def test_an_embedding_with_more_rows_than_the_vocabulary(calls):
    given, wanted = problem(), problem()
    more = torch.cat([given["dense"].weight, torch.full((9, D), 7.0)])
    given["dense"] = given["dense"]._replace(weight=more)
    assert torch.equal(ops.refine(top_k=9, **given), ops.refine(top_k=9, **wanted))
    assert calls == [5, 5]


@pytest.mark.parametrize("short", ["hidden", "logits", "weight", "bias", "common", "error", "mean"])
@torch.no_grad()
def test_what_is_too_short_is_read_by_pytorch_which_says_so(short, calls):
    given = problem(deviations=1e9)
    if short in ("hidden", "logits"):
        given[short] = given[short][:4] if short == "hidden" else given[short][:, :-1]
    else:
        for name in ("dense", "offset", "rule"):
            if short in given[name]._fields:
                tensor = getattr(given[name], short)[:-1].contiguous()
                given[name] = given[name]._replace(**{short: tensor})
    if short == "logits":  # tokens that nobody asks for: rows of an embedding may be more
        ops.refine(top_k=699, **given)
        return
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        ops.refine(top_k=700, **given)
    assert calls == []


@pytest.mark.parametrize("top_k", [0, -1, 701])
def test_a_number_that_cannot_be(top_k):
    with pytest.raises(ValueError, match=rf"`k` must be in 1\.\.700, the vocabulary, got {top_k}"):
        ops.refine(top_k=top_k, **problem())


def test_autograd_notices_that_kept_logits_were_changed():
    given = problem()
    kept = given["logits"].requires_grad_().exp()
    with torch.no_grad():
        ops.refine(top_k=9, **given | {"logits": kept})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_inference_mode_and_vmap():
    given = problem(deviations=0.8)
    wanted = ops.refine(top_k=9, **given)
    with torch.inference_mode():
        made = given["logits"].clone()
        torch.testing.assert_close(ops.refine(top_k=9, **given | {"logits": made}), wanted)
    hidden, logits = given.pop("hidden"), given.pop("logits")
    with torch.no_grad():
        got = torch.vmap(lambda h, z: ops.refine(h[None], z[None], 9, **given)[0])(hidden, logits)
    torch.testing.assert_close(got, wanted)


@each_way
@torch.no_grad()
def test_a_row_that_is_not_finite(backend, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, backend)
    given = problem(3)
    given["hidden"][1] = float("nan")
    given["logits"][1] = float("nan")
    got = ops.refine(top_k=4, **given)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())


@torch.no_grad()
def test_threads_do_not_change_the_result():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(ops.refine(top_k=50, **problem(4, 30_000, deviations=0.8)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_with_gradient_the_given_logits_stay(calls):
    given = problem(deviations=0.8)
    before = given["logits"].clone()
    got = ops.refine(top_k=9, **given)
    assert torch.equal(given["logits"], before)
    assert calls == []
    with torch.no_grad():
        torch.testing.assert_close(got, ops.refine(top_k=9, **given))


@torch.no_grad()
def test_what_the_library_cannot_read_pytorch_does(calls):
    want = ops.refine(top_k=9, **problem())
    calls.clear()
    given = problem()
    wide = torch.empty(5, 700, 2)[..., 0]
    wide.copy_(given["logits"])
    torch.testing.assert_close(ops.refine(top_k=9, **given | {"logits": wide}), want)
    double = {name: given[name].double() for name in ("hidden", "logits")}
    got = ops.refine(top_k=9, **given | double)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want)
    assert calls == []


@pytest.mark.skipif(not COMPILED, reason="the compiled library was not built")
@torch.no_grad()
def test_a_row_with_fewer_numbers_than_candidates_keeps_them(calls):
    given = problem(deviations=1e-6)  # only the best is scored
    wide = torch.full((5, 700, 2), torch.nan)[..., 0]  # for PyTorch, but the largest are found here
    wide[:, [0, 5]] = torch.tensor([1.0, 2.0])
    less = ops.shift(given["hidden"], given["offset"])[:, 0]
    refined = ops.refine(top_k=9, **given | {"logits": wide})
    assert calls == []
    torch.testing.assert_close(refined[:, 0], 1.0 - less)
    assert refined[:, 5].isfinite().all()
    assert refined[:, 1].isnan().all()


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@torch.no_grad()
def test_rows_are_gathered_in_parts(at_once, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "eager")
    want = ops.refine(top_k=9, **problem(7))
    monkeypatch.setattr(refining, "CHUNK_BYTES", 4 * 9 * D * at_once)
    torch.testing.assert_close(ops.refine(top_k=9, **problem(7)), want)


def test_gradients():
    given = problem(2, 30, deviations=0.8, dtype=torch.float64, weight=torch.float64)
    hidden, logits = (given.pop(name).requires_grad_() for name in ("hidden", "logits"))
    assert torch.autograd.gradcheck(
        lambda h, z: ops.refine(h, z, top_k=6, **given), (hidden, logits)
    )

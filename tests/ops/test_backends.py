import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, matmul


@pytest.fixture
def choose(monkeypatch):
    def for_expand(name, scores, codes, code_type):
        monkeypatch.setenv(backends.VARIABLE, name)
        return backends.for_expand(scores, codes, code_type)

    return for_expand


SIGN = references.random_scores(2, 20), references.random_sign_codes(30, 20), "sign"
SMALL = references.random_scores(2, 3, 32), references.random_index_codes(30, 3, 32), "index"
LARGE = references.random_scores(2, 3, 33), references.random_index_codes(30, 3, 33), "index"


@pytest.mark.parametrize("name", ["", "AVX512", "numpy"])
def test_an_unknown_backend_is_refused(name, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, name)
    message = f"VQLOGITS_BACKEND is {name!r}, which is no backend; set it to one of auto, eager"
    with pytest.raises(ValueError, match=message):
        ops.expand(SIGN[0], SIGN[1], code_type="sign")
    with pytest.raises(ValueError, match=message):
        backends.for_expand_backward(torch.zeros(2, 30), SIGN[1], "sign", 20)


def test_a_machine_with_avx512_uses_it_where_it_can(choose, monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ("avx512", "plain"))
    for name in ("auto", "cpu"):
        assert choose(name, *SIGN) == "avx512"
        assert choose(name, *SMALL) == "avx512"
        assert choose(name, *LARGE) == "plain"
    assert choose("plain", *SIGN) == "plain"


def test_a_machine_without_avx512_uses_portable_code(choose, monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ("plain",))
    for name in ("auto", "cpu", "plain"):
        assert choose(name, *SIGN) == "plain"
    with pytest.raises(RuntimeError, match="VQLOGITS_BACKEND=avx512 cannot be obeyed: .*'plain'"):
        choose("avx512", *SIGN)


def test_a_machine_without_a_compiler_uses_pytorch(choose, monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ())
    assert choose("auto", *SIGN) == "matmul"
    assert choose("auto", *SMALL) == "eager"
    with pytest.raises(RuntimeError, match="VQLOGITS_BACKEND=cpu cannot be obeyed"):
        choose("cpu", *SIGN)


def test_a_large_matrix_is_not_kept(choose, monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ())
    monkeypatch.setattr(matmul, "_LARGEST_MATRIX_BYTES", 30 * 20 * 4 - 1)
    assert choose("auto", *SIGN) == "eager"
    assert choose("auto", SIGN[0].bfloat16(), *SIGN[1:]) == "matmul"


@pytest.mark.parametrize("name", ["auto", "eager", "matmul"])
def test_double_precision_stays_exact(name, choose):
    assert choose(name, SIGN[0].double(), *SIGN[1:]) in ("eager", "matmul")


def test_double_precision_is_refused_by_a_forced_kernel(choose):
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16 on the CPU"):
        choose("cpu", SIGN[0].double(), *SIGN[1:])


def test_codes_whose_edits_cannot_be_noticed_are_not_kept(choose, monkeypatch):
    with torch.inference_mode():
        codes = SIGN[1].clone()
    monkeypatch.setattr(cpu, "paths", lambda: ("avx512", "plain"))
    assert choose("auto", SIGN[0], codes, "sign") == "plain"
    monkeypatch.setattr(cpu, "paths", lambda: ())
    assert choose("auto", SIGN[0], codes, "sign") == "eager"


@pytest.mark.parametrize("name", [*backends.BACKENDS])
def test_gradients_never_need_a_kernel(name, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, name)
    for paths in ((), ("plain",)):
        monkeypatch.setattr(cpu, "paths", lambda paths=paths: paths)
        backend = backends.for_expand_backward(torch.zeros(2, 30), SIGN[1], "sign", 20)
        kept = name == "matmul" or (name != "eager" and not paths)
        assert backend == ("matmul" if kept else "eager")

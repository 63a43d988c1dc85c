import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cpu, matmul, triton_backend


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


def test_a_machine_with_amx_uses_it_for_signs_of_many_rows(choose, monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ("amx", "avx512", "plain"))
    few, many = (references.random_scores(rows, 20) for rows in (23, 24))
    for name in ("auto", "cpu"):
        assert choose(name, few, *SIGN[1:]) == "avx512"
        assert choose(name, many, *SIGN[1:]) == "amx"
        assert choose(name, SMALL[0].repeat(12, 1, 1), *SMALL[1:]) == "avx512"
    assert choose("amx", *SIGN) == "amx"
    assert choose("avx512", many, *SIGN[1:]) == "avx512"
    with pytest.raises(RuntimeError, match="VQLOGITS_BACKEND=amx .* amx sign codes alone"):
        choose("amx", *SMALL)


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
    monkeypatch.setattr(triton_backend, "usable", lambda device: False)
    for paths in ((), ("plain",)):
        monkeypatch.setattr(cpu, "paths", lambda paths=paths: paths)
        backend = backends.for_expand_backward(torch.zeros(2, 30), SIGN[1], "sign", 20)
        without = "matmul" if name != "eager" else "eager"
        compiled = paths and name not in ("eager", "matmul")
        assert backend == ("cpu" if compiled else without)
        # Index codes, and sums that are to be exact to more digits, have nothing compiled.
        assert backends.for_expand_backward(torch.zeros(2, 30), LARGE[1], "index", 3) == "eager"
        exact = torch.zeros(2, 30, dtype=torch.float64)
        assert backends.for_expand_backward(exact, SIGN[1], "sign", 20) != "cpu"


class OnGPU:
    """Stands for a tensor on a GPU, of which the choice reads no more than this."""

    device = torch.device("cuda", 0)
    is_inference = staticmethod(lambda: False)

    def __init__(self, tensor):
        self.dtype, self.shape = tensor.dtype, tensor.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_uses_triton(dtype, choose, monkeypatch):
    monkeypatch.setattr(triton_backend, "usable", lambda device: device.type == "cuda")
    for name in ("auto", "triton"):
        for scores, codes, code_type in (SIGN, LARGE):
            assert choose(name, OnGPU(scores.to(dtype)), codes, code_type) == "triton"
        grad = OnGPU(torch.zeros(2, 30, dtype=dtype))
        assert backends.for_expand_backward(grad, SIGN[1], "sign", 20) == "triton"
        assert backends.for_expand_backward(grad, LARGE[1], "index", 3) == "eager"
        assert backends.for_cross_entropy(OnGPU(SIGN[0].to(dtype)), *SIGN[1:]) == "triton"
        assert backends.for_cross_entropy(OnGPU(LARGE[0].to(dtype)), *LARGE[1:]) == "chunked"
    for name in ("eager", "matmul"):
        assert choose(name, OnGPU(SIGN[0]), *SIGN[1:]) == name
        assert backends.for_expand_backward(grad, SIGN[1], "sign", 20) == name
        assert backends.for_cross_entropy(OnGPU(SIGN[0]), *SIGN[1:]) == "chunked"
    with pytest.raises(RuntimeError, match="VQLOGITS_BACKEND=cpu cannot be obeyed"):
        choose("cpu", OnGPU(SIGN[0]), *SIGN[1:])


def test_a_gpu_without_triton_uses_pytorch(choose, monkeypatch):
    monkeypatch.setattr(triton_backend, "obstacle", lambda device: "no such module")
    assert choose("auto", OnGPU(SIGN[0]), *SIGN[1:]) == "matmul"
    assert choose("auto", OnGPU(SMALL[0]), *SMALL[1:]) == "eager"
    assert backends.for_cross_entropy(OnGPU(SIGN[0]), *SIGN[1:]) == "chunked"
    with pytest.raises(RuntimeError, match=r"=triton cannot be obeyed: .* \(no such module\)"):
        choose("triton", OnGPU(SIGN[0]), *SIGN[1:])


def test_triton_knows_no_double_precision_and_keeps_no_codes_of_inference(choose, monkeypatch):
    monkeypatch.setattr(triton_backend, "obstacle", lambda device: None)
    with torch.inference_mode():
        codes = SIGN[1].clone()
    assert choose("auto", OnGPU(SIGN[0].double()), *SIGN[1:]) == "matmul"
    assert choose("auto", OnGPU(SIGN[0]), codes, "sign") == "eager"
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16, and no codes"):
        choose("triton", OnGPU(SIGN[0].double()), *SIGN[1:])
    with pytest.raises(RuntimeError, match="torch.float32 .* and no codes made under"):
        choose("triton", OnGPU(SIGN[0]), codes, "sign")


def test_the_processor_never_asks_for_triton(choose, monkeypatch):
    monkeypatch.setattr(triton_backend, "usable", lambda device: True)
    assert choose("auto", *SIGN) != "triton"
    grad = torch.zeros(2, 30)
    assert backends.for_expand_backward(grad, SIGN[1], "sign", 20) != "triton"
    assert backends.for_cross_entropy(*SIGN) == "chunked"


def test_compiled_functions_get_plain_tensors_on_the_cpu_past_the_dispatcher():
    class Sharded(torch.Tensor):
        pass

    plain = torch.zeros(2)
    trained = torch.zeros(2, requires_grad=True)
    assert backends.callable_directly(plain, torch.nn.Parameter(plain, requires_grad=False))
    for other in (torch.zeros(2, device="meta"), plain.as_subclass(Sharded), trained):
        assert not backends.callable_directly(plain, other)
    with torch.no_grad():
        assert backends.callable_directly(plain, trained)
    with torch.autocast("cpu"):
        assert not backends.callable_directly(plain)
    assert torch.func.vmap(lambda row: row * backends.callable_directly(plain))(plain).sum() == 0

import faiss
import torch

from benchmarks.peers.faiss_codes import product_codes, residual_codes


def rows(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 16).bfloat16().float()


def test_product_codes_are_lossless_with_a_codeword_a_row():
    made = product_codes(rows(16), 4, bits=4)
    torch.testing.assert_close(made.weight, rows(16), rtol=0, atol=0)


def test_bytes_of_product_codes():
    made = product_codes(rows(400), 4, bits=5)
    assert made.total_bytes == 400 * 4 * 5 // 8 + 2 * 32 * 16
    assert made.weight.shape == (400, 16)


def test_product_codes_take_the_nearest_codewords():
    made, given = product_codes(rows(400), 4, bits=5).weight, rows(400)
    for part, mine in zip(given.split(4, 1), made.split(4, 1), strict=True):
        words = mine.unique(dim=0)
        assert len(words) <= 32
        nearest = torch.cdist(part.double(), words.double()).amin(1)
        torch.testing.assert_close((part - mine).double().norm(dim=1), nearest, rtol=0, atol=0.02)


def test_residual_codes_are_what_faiss_itself_decodes():
    quantiser = faiss.ResidualQuantizer(16, 6, 4)
    quantiser.train_type = faiss.ResidualQuantizer.Train_default
    quantiser.cp.seed = 3
    quantiser.train(rows(400).numpy())
    decoded = quantiser.decode(quantiser.compute_codes(rows(400).numpy()))
    made = residual_codes(rows(400), 6, bits=4, seed=3).weight
    # Codewords are rounded to 8 bits.
    torch.testing.assert_close(made, torch.from_numpy(decoded), rtol=0, atol=0.03)


def test_bytes_and_error_of_residual_codes():
    made = residual_codes(rows(400), 8, bits=4)
    assert made.total_bytes == 400 * 8 // 2 + 2 * 8 * 16 * 16
    error = (made.weight - rows(400)).square().mean() / rows(400).square().mean()
    assert error < 2 ** (-2 * 8 * 4 / 16) * 3  # three times what a normal source would need

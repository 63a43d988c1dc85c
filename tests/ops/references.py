"""The equations in float64, one entry at a time where that is affordable."""

import torch
from torch import Tensor


def sign_matrix(codes: Tensor, num_codebooks: int) -> Tensor:
    """Bit r of token v is (codes[v, r // 8] >> (r % 8)) & 1; 1 means +1 and 0 means -1."""
    r = torch.arange(num_codebooks)
    bits = (codes[:, r // 8].long() >> (r % 8)) & 1
    return 2.0 * bits.double() - 1.0


def logits(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    exact = scores.double()
    if code_type == "sign":
        signs = sign_matrix(codes, scores.shape[1])
        for row, token in enumerate([] if fine_ids is None else fine_ids.tolist()):
            signs[token] += sign_matrix(fine_codes[row : row + 1], scores.shape[1])[0] / 2
        return torch.einsum("nr,vr->nv", exact, signs)
    terms = [exact[:, g][:, codes[:, g].long()] for g in range(codes.shape[1])]
    return torch.stack(terms).sum(0)


def random_sign_codes(vocabulary: int, num_codebooks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        0, 256, (vocabulary, -(-num_codebooks // 8)), dtype=torch.uint8, generator=generator
    )
    codes[:, -1] &= 255 >> (-num_codebooks % 8)
    return codes


def random_index_codes(vocabulary: int, num_codebooks: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, size, (vocabulary, num_codebooks), generator=generator)
    return codes.to(torch.uint8 if size <= 256 else torch.int32)


def random_scores(rows: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


# rows N, vocabulary V, R
SIGN_SHAPES = [
    (0, 10, 7),
    (1, 1, 1),
    (1, 515, 7),
    (7, 333, 31),
    (33, 77, 983),
    (2, 1500, 491),
    (3, 600, 8),
    (70, 40, 15),
]
# rows N, vocabulary V, G, K
INDEX_SHAPES = [
    (0, 10, 2, 3),
    (1, 1, 1, 1),
    (7, 333, 3, 2),
    (1, 1025, 11, 4),
    (33, 77, 2, 31),
    (5, 600, 4, 32),
    (3, 129, 3, 33),
    (2, 300, 2, 256),
    (6, 300, 2, 257),
    (4, 50, 125, 5),
]

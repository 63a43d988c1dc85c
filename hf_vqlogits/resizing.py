"""Codes of tokens that are added to a vocabulary.

A new token should start near the mean of the vocabulary, as Transformers' own mean resizing does
it, and yet have a code of its own: two tokens with one code keep equal logits whatever is trained.
So every new token starts from random bits, descends to its own nearest local minimum of the
distance to the mean, and moves on by a few bits where another token sits there already. With
smaller heads inside it descends in each of them first, and then by the bits that come after.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import ops
from .embedding import VQEmbedding
from .head import VQLogitsHead
from .ops import eager

CHUNK = 8192  # tokens unpacked at a time
MOST_TRIES = 10_000  # for a free code; where so many are taken there is hardly room


def resized_vocabulary(current: int, new: int | None, pad_to_multiple_of: int | None) -> int:
    """Vocabulary size that a call of `resize_token_embeddings` asks for.

    Args:
        current: V now.
        new: V wanted, or None for the current one.
        pad_to_multiple_of: round up to a multiple of this.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1.
    """
    for name, value in (("new_num_tokens", new), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    size = current if new is None else new
    multiple = pad_to_multiple_of or 1
    return -(-size // multiple) * multiple


@torch.no_grad()
def resized_codes(head: VQLogitsHead, new_size: int) -> Tensor:
    """The head's codes cut to, or continued up to, `new_size` tokens.

    Args:
        head: the head, of vocabulary V; it is not changed.
        new_size: vocabulary size wanted, at least 1.

    Returns:
        Codes of `new_size` tokens, in the layout of `head.codes`. The same call gives the same
        codes.

    Raises:
        ValueError: fewer tokens than an index codebook has codewords.
    """
    old_size = head.out_features
    if head.code_type == "index" and new_size < head.codebook_size:
        raise ValueError(
            f"A vocabulary of {new_size} is smaller than `codebook_size` ({head.codebook_size}): "
            "codewords would be left without a token. Convert the original model again with a "
            "smaller `--codebook-size`."
        )
    if new_size <= old_size:
        return head.codes[:new_size].clone()
    generator = torch.Generator().manual_seed(old_size)
    count = new_size - old_size
    if head.code_type == "sign":
        sizes = [_columns(head, f"_{bits}") for bits in head.nested_codebooks]
        new = _new_sign_codes(head, [*sizes, _columns(head)], count, generator)
    else:
        new = _new_index_codes(head, count, generator)
    return torch.cat([head.codes, new.to(head.codes)])


@torch.no_grad()
def resized_embedding_codes(embedding: VQEmbedding, new_size: int) -> Tensor:
    """Codes of a quantised input embedding cut to, or continued up to, `new_size` tokens.

    Args:
        embedding: of vocabulary V; it is not changed.
        new_size: vocabulary size wanted, at least 1.

    Returns:
        Codes (new_size, ceil(R / 8)). The same call gives the same codes.
    """
    old = embedding.codes
    if new_size <= len(old):
        return old[:new_size].clone()
    generator = torch.Generator().manual_seed(len(old))
    columns = embedding.score_scale * embedding.codebook.float().cpu()
    new = _new_sign_codes(embedding, [columns], new_size - len(old), generator)
    return torch.cat([old, new.to(old)])


def _columns(head: VQLogitsHead, which: str = "") -> Tensor:
    """Codewords as (..., d + 1): weights at the scale of a hidden state, and logit at its mean.

    Of a smaller head inside, named by the end of its codebook's name, in units of its own.
    """
    codebook, bias = (
        getattr(head, name + which).detach().float().cpu() for name in ("codebook", "codebook_bias")
    )
    mean = head.hidden_mean.float().cpu()
    at_mean = codebook @ mean + bias
    norm = mean.norm() / head.in_features**0.5
    columns = torch.cat([codebook * (norm if norm > 0 else 1.0), at_mean.unsqueeze(-1)], -1)
    return head.score_scale * columns


def _new_sign_codes(
    coded: VQLogitsHead | VQEmbedding,
    sizes: list[Tensor],
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Codes of `count` tokens beside those that are there.

    Args:
        coded: the layer.
        sizes: its codewords (R, D), before them those of the smaller ones inside, ascending.
        count: of new tokens.
        generator: of their bits.
    """
    terms, old = len(sizes[-1]), coded.codes.cpu()
    sums = [ops.unpack_signs(part, terms).sum(0) for part in old.split(CHUNK)]
    if coded.fine_codes is not None:
        fine = coded.fine_codes.cpu().split(CHUNK)
        sums += [eager.FINE_FACTOR * ops.unpack_signs(part, terms).sum(0) for part in fine]
    mean_sign = torch.stack(sums).sum(0) / len(old)
    chance = torch.rand(count, terms, generator=generator)
    signs = torch.where(chance < (1 + mean_sign) / 2, 1.0, -1.0)
    first = 0
    for columns in sizes:
        last = len(columns)
        gram = columns @ columns.T
        # Half the gradient of the squared distance.
        slope = (signs[:, :last] - mean_sign[:last]) @ gram
        for _ in range(2 * (last - first)):
            # A quarter of what flipping each bit adds.
            change = gram.diagonal()[first:] - signs[:, first:last] * slope[:, first:]
            gain, bit = change.min(1)
            active = (gain < 0).nonzero().squeeze(1)
            if not len(active):
                break
            bit = first + bit[active]
            slope[active] -= 2 * signs[active, bit, None] * gram[bit]
            signs[active, bit] *= -1
        first = last
    codes = ops.pack_signs(signs)

    def by_cost(token: int) -> list[int]:
        return (gram.diagonal() - signs[token] * slope[token]).argsort().tolist()

    def flip(row: np.ndarray, bit: int) -> None:
        row[bit // 8] ^= 1 << bit % 8

    return _separate(codes, old, by_cost, flip)


def _new_index_codes(head: VQLogitsHead, count: int, generator: torch.Generator) -> Tensor:
    columns = _columns(head)  # G, K, d + 1
    old = head.codes.cpu().long()
    books = range(head.num_codebooks)
    used = torch.stack([old[:, g].bincount(minlength=head.codebook_size) for g in books])
    mean = torch.einsum("gk,gkd->d", used / len(old), columns)
    drawn = torch.randint(0, len(old), (count, len(books)), generator=generator)
    new = old.gather(0, drawn)
    rest = mean - sum(columns[g, new[:, g]] for g in books)  # count, d + 1
    for _ in range(3):  # nothing moved after three sweeps in any case tried
        for g in books:
            rest = rest + columns[g, new[:, g]]
            new[:, g] = torch.cdist(rest, columns[g]).argmin(1)
            rest = rest - columns[g, new[:, g]]
    if head.num_codebooks == 1:
        return new  # tokens share codewords by design

    def by_distance(token: int) -> list[int]:
        others = [rest[token] + columns[g, new[token, g]] - columns[g] for g in books]
        return torch.cat(others).norm(dim=-1).argsort().tolist()

    def replace(row: np.ndarray, codeword: int) -> None:
        book, index = divmod(codeword, head.codebook_size)
        row[book] = index

    return _separate(new, old, by_distance, replace)


def _separate(
    codes: Tensor,
    taken: Tensor,
    moves: Callable[[int], list[int]],
    apply: Callable[[np.ndarray, int], None],
) -> Tensor:
    """Give each new token a free code, few and cheap moves away from its own.

    Args:
        codes: of the new tokens (count, columns), changed in place.
        taken: codes of the old tokens (V, columns), of the same type.
        moves: the moves of a new token, the cheapest first.
        apply: carries a move out on a row of codes.

    Returns:
        `codes`. Where no free one is found the token shares the code it had.
    """
    seen = {row.tobytes() for row in taken.numpy()}
    for token, row in enumerate(codes.numpy()):
        if row.tobytes() in seen:
            cheapest = moves(token)
            several = (itertools.combinations(cheapest, count) for count in (1, 2, 3))
            for chosen in itertools.islice(itertools.chain.from_iterable(several), MOST_TRIES):
                other = row.copy()
                for move in chosen:
                    apply(other, move)
                if other.tobytes() not in seen:
                    row[:] = other
                    break
        seen.add(row.tobytes())
    return codes

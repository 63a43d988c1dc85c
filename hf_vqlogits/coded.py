"""What output layer and input embedding have in common: codewords, and codes for every token.

Letters: V vocabulary, R bits a token, F tokens with a second code.
"""

import math

import torch
from torch import Tensor, nn

WHERE_FROM = "the checkpoint is damaged or its config.json belongs to another model."


def score_scale(num_codebooks: int) -> float:
    """The power of two nearest to one over the number of terms of a logit, G or R."""
    return 2.0 ** -round(math.log2(num_codebooks))


class CodedLayer(nn.Module):
    """Base of the layers whose V x d matrix is a codebook and a code per token.

    Attributes:
        num_codebooks: G, or R for sign codes.
        score_scale: the power of two nearest to 1 / G (1 / R for sign codes).
        codebook: parameter, the last dimension is d.
        codes: buffer, sign codes uint8 (V, ceil(R / 8)), bit r of a token in bit r % 8 of byte
            r // 8, 1 meaning +1; index codes (V, G).
        fine_codes: buffer uint8 (F, ceil(R / 8)), second sign codes, which count half; None
            without.
        fine_ids: buffer int32 (F,), the tokens that have them, ascending; None without.
    """

    num_codebooks: int
    score_scale: float
    codebook: nn.Parameter
    codes: Tensor
    fine_codes: Tensor | None
    fine_ids: Tensor | None

    def _register_codes(self, codes: Tensor, num_fine_tokens: int) -> None:
        self.register_buffer("codes", codes)
        fine_codes = fine_ids = None
        if num_fine_tokens:
            fine_codes = codes.new_empty(num_fine_tokens, codes.shape[1])
            fine_ids = torch.empty(num_fine_tokens, dtype=torch.int32)
        self.register_buffer("fine_codes", fine_codes)
        self.register_buffer("fine_ids", fine_ids)

    @property
    def num_fine_tokens(self) -> int:
        """F, how many tokens have a second code."""
        return 0 if self.fine_ids is None else len(self.fine_ids)

    @property
    def codes_bytes(self) -> int:
        """Bytes of all codes, with those of `fine_ids`."""
        codes = (self.codes, self.fine_codes, self.fine_ids)
        return sum(t.numel() * t.element_size() for t in codes if t is not None)

    def initial_tensors(self) -> dict[str, Tensor]:
        """Random tensors of a layer to be trained from scratch, by name, drawn on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the layer anew from PyTorch's global generator; nothing happens on `meta`."""
        if self.codebook.is_meta:
            return
        for name, value in self.initial_tensors().items():
            getattr(self, name).copy_(value)

    def _initial_codebook(self, nested_bits: int | None = None) -> Tensor:
        """Normal codewords with the deviation that gives rows that of a dense layer at 0.02.

        Args:
            nested_bits: R of a smaller layer inside; default the whole one.
        """
        shape, terms = tuple(self.codebook.shape), self.num_codebooks
        if nested_bits is not None:
            shape, terms = (nested_bits, *shape[1:]), nested_bits
        deviation = 0.02 / (score_scale(terms) * terms**0.5)
        return torch.randn(shape, device="cpu") * deviation

    def _initial_sign_codes(self) -> dict[str, Tensor]:
        """Uniform codes; second ones are of the first tokens."""

        def bits(count: int) -> Tensor:
            shape = (count, self.codes.shape[1])
            drawn = torch.randint(0, 256, shape, dtype=torch.uint8, device="cpu")
            drawn[:, -1] &= 255 >> (-self.num_codebooks % 8)  # padding bits are 0
            return drawn

        codes = {"codes": bits(len(self.codes))}
        if self.fine_ids is not None:
            ids = torch.arange(len(self.fine_ids), dtype=torch.int32, device="cpu")
            codes |= {"fine_codes": bits(len(ids)), "fine_ids": ids}
        return codes

    def set_codes(self, codes: Tensor) -> None:
        """Take the codes of another vocabulary; second ones stay with tokens that are in it."""
        self.codes = codes
        if self.fine_ids is None or self.fine_codes is None:
            return
        kept = self.fine_ids < len(codes)
        some = bool(kept.any())
        self.fine_codes = self.fine_codes[kept] if some else None
        self.fine_ids = self.fine_ids[kept] if some else None

    def _check_sign_codes(self) -> None:
        for name in ("codes", "fine_codes"):
            codes, used = getattr(self, name), self.num_codebooks % 8
            if codes is None or not used:
                continue
            wrong = codes[:, -1] >> used
            if bool(wrong.any()):
                raise ValueError(
                    f"`{name}` sets bits above the {self.num_codebooks} of `num_codebooks`, first "
                    f"in row {int(wrong.nonzero()[0])}: {WHERE_FROM}"
                )
        ids, tokens = self.fine_ids, len(self.codes)
        if ids is None:
            return
        outside = ids[(ids < 0) | (ids >= tokens)]
        if len(outside) or bool((ids.diff() <= 0).any()):
            what = f"holds {int(outside[0])}" if len(outside) else "is not in ascending order"
            raise ValueError(
                f"`fine_ids` {what}, but must name {len(ids)} different tokens of the vocabulary "
                f"of {tokens} in ascending order: {WHERE_FROM}"
            )

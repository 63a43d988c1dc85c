"""The vector-quantised input embedding.

Letters: V vocabulary, d width of the embedding, R bits a token.

A token's row is the signed mean of R shared vectors, as in the output layer, plus one vector that
all tokens share:

    row[v] = score_scale * sum_r s[v, r] codebook[r] + offset,  s = +1 or -1

The offset is there because the output layer's codes leave it out: one vector added to all output
vectors changes no probability, but to all input vectors it does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .coded import CodedLayer, score_scale

# The tensors that a tied embedding has in common with the head.
SHARED = ("codebook", "codes", "fine_codes", "fine_ids")


class VQEmbedding(CodedLayer):
    """Input embedding whose V x d table is a small codebook and a sign code per token.

    Equivalent to `nn.functional.embedding(ids, embedding.weight) * embed_scale`, without the table.

    Attributes:
        codebook: parameter (R, d).
        offset: parameter (d,), added to every row.
        codes: buffer, uint8 (V, ceil(R / 8)), bit r of a token in bit r % 8 of byte r // 8, 1
            meaning +1.
        fine_codes: buffer uint8 (F, ceil(R / 8)), second codes of F tokens, which count half; None
            without.
        fine_ids: buffer int32 (F,), which tokens, ascending; None without.
        score_scale: the power of two nearest to 1 / R.
        padding_idx: the token from whose row nothing is learned, or None. Its row is what its code
            says, and not zero.
        embed_scale: the family's own factor on its embeddings (Gemma's sqrt(d)), or None.

    Args:
        num_embeddings: V.
        embedding_dim: d.
        num_codebooks: R, bits a token.
        num_fine_tokens: F, how many tokens have a second code.
        padding_idx: see above.
        embed_scale: see above.

    Example:
        >>> embedding = VQEmbedding(50257, 768, num_codebooks=1003)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 768])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_codebooks: int,
        num_fine_tokens: int = 0,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
    ):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_codebooks = num_codebooks
        self.score_scale = score_scale(num_codebooks)
        self.padding_idx = padding_idx
        self.embed_scale = embed_scale
        self.codebook = nn.Parameter(torch.empty(num_codebooks, embedding_dim))
        self.offset = nn.Parameter(torch.empty(embedding_dim))
        codes = torch.empty(num_embeddings, -(-num_codebooks // 8), dtype=torch.uint8)
        self._register_codes(codes, num_fine_tokens)
        self.reset_parameters()

    @classmethod
    def in_place_of(
        cls, dense: nn.Module, num_codebooks: int, num_fine_tokens: int = 0
    ) -> "VQEmbedding":
        """An embedding of random codes with the shape, scale and padding of a dense one.

        Raises:
            ValueError: the dense one is none that it could stand for.
        """
        scale = family_scale(dense)
        assert isinstance(dense, nn.Embedding)
        return cls(
            dense.num_embeddings,
            dense.embedding_dim,
            num_codebooks=num_codebooks,
            num_fine_tokens=num_fine_tokens,
            padding_idx=dense.padding_idx,
            embed_scale=scale,
        )

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.codes.shape[0]

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The dense table (V, d) before the family's scale, written out anew at every access.

        For code that reads it, be it for its shape only; changes to it are lost. In float32 or the
        codebook's type where that is wider.
        """
        exact = self.codebook.to(torch.promote_types(self.codebook.dtype, torch.float32))
        tokens = torch.arange(self.num_embeddings, device=self.codes.device)
        return self._rows(tokens, exact) + self.offset

    def initial_tensors(self) -> dict[str, Tensor]:
        """Random tensors to be trained from scratch, by name, drawn on the CPU.

        Codes are uniform, second codes are of the first tokens; codewords are normal with the
        deviation that gives rows the variance of a dense embedding initialised at 0.02.
        """
        return {
            "codebook": self._initial_codebook(),
            "offset": torch.zeros(self.embedding_dim, device="cpu"),
            **self._initial_sign_codes(),
        }

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of tokens: (...) int64 or int32 -> (..., d) in the type of the codebook."""
        rows = self._rows(input_ids, self.codebook) + self.offset
        if self.padding_idx is not None and rows.requires_grad:
            padding = (input_ids == self.padding_idx).unsqueeze(-1)
            rows = torch.where(padding, rows.detach(), rows)
        if self.embed_scale is not None:
            # Rounded to the type of the rows first, as Gemma does it.
            rows = rows * torch.full((), self.embed_scale, dtype=rows.dtype, device=rows.device)
        return rows

    def _rows(self, ids: Tensor, codebook: Tensor) -> Tensor:
        return ops.gather_rows(
            self.codes,
            ids,
            codebook,
            self.score_scale,
            fine_ids=self.fine_ids,
            fine_codes=self.fine_codes,
        )

    def set_codes(self, codes: Tensor) -> None:
        """Take codes of another vocabulary (V, ceil(R / 8)); second codes stay, where they can."""
        super().set_codes(codes)
        if self.padding_idx is not None and self.padding_idx >= len(codes):
            self.padding_idx = None

    def check_codes(self) -> None:
        """Check that the codes are possible ones.

        Raises:
            ValueError: a code sets a bit above R, or the tokens with a second code are not
                different ones of the vocabulary, ascending.
        """
        self._check_sign_codes()

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, num_codebooks={self.num_codebooks}, "
            f"num_fine_tokens={self.num_fine_tokens}, padding_idx={self.padding_idx}, "
            f"embed_scale={self.embed_scale}"
        )

    def storage(self) -> dict[str, Any]:
        """Sizes that every report quotes.

        Returns:
            `float_parameters` (codebook and offset), `codes_bytes` and `total_bytes`.
        """
        floats = (self.codebook, self.offset)
        return {
            "float_parameters": sum(t.numel() for t in floats),
            "codes_bytes": self.codes_bytes,
            "total_bytes": self.codes_bytes + sum(t.numel() * t.element_size() for t in floats),
        }


def family_scale(dense: nn.Module) -> float | None:
    """The factor that a family's own embedding class puts on its rows, or None.

    Transformers has such classes under many names, of two kinds: the factor is `scalar_embed_scale`
    (the Gemmas) or a number `embed_scale` (BioGPT, XGLM). Most families apply theirs after the
    embedding, in the backbone, where it stays.

    Raises:
        ValueError: it is no embedding, or one that does something else with its rows.
    """
    if type(dense) is nn.Embedding and dense.max_norm is None:
        return None
    scale = getattr(dense, "scalar_embed_scale", getattr(dense, "embed_scale", None))
    if not isinstance(dense, nn.Embedding) or not isinstance(scale, int | float):
        raise ValueError(
            f"The input embedding is a {type(dense).__name__}, whose rows are not known to be a "
            "table's times a factor; it can only stay dense (`embeddings='keep'`)."
        )
    return None if scale == 1 else float(scale)

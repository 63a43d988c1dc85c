"""How large a head a user asks for: from options to numbers of codebooks and codewords."""

from dataclasses import dataclass, replace
from typing import Any

from .errors import ConversionError

SINGLE_CODEBOOK = ("kmeans", "random", "contiguous", "frequency")
INDEX_METHODS = ("residual", *SINGLE_CODEBOOK)
METHODS = ("signs", *INDEX_METHODS)
DEFAULT_REDUCTION = 0.98
# Four codewords a codebook give the most bits for a number of float parameters (as many as two,
# with half the look-ups); on a GPT-2 with d = 256, 125 codebooks of 4 gave a perplexity factor of
# 1.06 where 8 of 63 gave 1.31.
RESIDUAL_CODEBOOK_SIZE = 4
# The tokens that count most have a second code, which costs this share of the codes' bytes. On
# SmolLM2-135M at 99%, perplexity factor with 0, 0.05, 0.1, 0.15, 0.25 and 1 of them: 1.288, 1.241,
# 1.225, 1.224, 1.206, 1.172.
DEFAULT_FINE_SHARE = 0.1
FINE_ID_BYTES = 4
MOST_BITS_PER_WEIGHT = 32  # codes of more would be larger than the dense layer in float32
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class HeadSize:
    """Code type and sizes of a head.

    Attributes:
        code_type: `"sign"` or `"index"`.
        num_codebooks: R for sign codes, G for index codes.
        codebook_size: K, 2 for sign codes.
        num_fine_tokens: F, how many tokens have a second sign code.
        nested_codebooks: R of smaller heads inside, ascending.
    """

    code_type: str
    num_codebooks: int
    codebook_size: int
    num_fine_tokens: int = 0
    nested_codebooks: tuple[int, ...] = ()

    def holding(self, nested_codebooks: tuple[int, ...]) -> "HeadSize":
        """This size with smaller ones inside."""
        return replace(self, nested_codebooks=nested_codebooks)

    @property
    def rungs(self) -> list["HeadSize"]:
        """The sizes inside, each with those inside it, and this one at the end."""
        nested = self.nested_codebooks
        inside = [replace(self.holding(nested[:i]), num_codebooks=r) for i, r in enumerate(nested)]
        return [*inside, self]

    @property
    def stored_codewords(self) -> int:
        """Rows of d + 1 floats that the head stores."""
        return self.num_codebooks * (1 if self.code_type == "sign" else self.codebook_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of a code in a file."""
        if self.code_type == "sign":
            return -(-self.num_codebooks // 8)
        return self.num_codebooks * (1 if self.codebook_size <= 256 else 4)

    def stored_bytes(self, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """Bytes of the head's tensors in a file.

        Args:
            vocab_size: V.
            hidden_size: d.
            itemsize: bytes of a float.
        """
        statistics = 2 * hidden_size  # mean hidden state and fold direction
        codewords = self.stored_codewords + sum(self.nested_codebooks)
        floats = codewords * (hidden_size + 1) + statistics
        fine = self.num_fine_tokens * (self.code_bytes + FINE_ID_BYTES)
        return vocab_size * self.code_bytes + fine + floats * itemsize


def codewords_within(reduction: float, vocab_size: int, hidden_size: int) -> int:
    """Largest number of codewords that keeps at most `1 - reduction` of the V d parameters.

    A codeword is d weights and a bias, so this is floor((1 - reduction) V d / (d + 1)).

    Raises:
        ConversionError: `reduction` lies outside (0, 1), or leaves no codeword.
    """
    _check_reduction(reduction)
    # The tiny addend undoes the rounding of 1 - 0.98 to 0.020000000000000018 and the like.
    count = int((1 - reduction) * vocab_size * hidden_size / (hidden_size + 1) + 1e-9)
    if count < 1:
        most = 1 - (hidden_size + 1) / (vocab_size * hidden_size)
        raise ConversionError(
            f"`param_reduction` {reduction} cannot be reached with V = {vocab_size} and d = "
            f"{hidden_size}: not one codeword is left. At most {most:.6f} can."
        )
    return count


def choose_size(
    method: str,
    *,
    vocab_size: int,
    hidden_size: int,
    param_reduction: float | None = None,
    bits: int | None = None,
    bits_per_weight: float | None = None,
    num_codebooks: int | None = None,
    codebook_size: int | None = None,
    fine_share: float | None = None,
) -> HeadSize:
    """Size of the head that the options describe; without any, 98% fewer parameters.

    Args:
        method: one of `METHODS`.
        vocab_size: V.
        hidden_size: d.
        param_reduction: share of the V d parameters to save, in (0, 1).
        bits: R, bits a token of sign codes.
        bits_per_weight: R / d.
        num_codebooks: G of index codes.
        codebook_size: K of index codes.
        fine_share: share of the tokens with a second sign code, 0 to 1; default 0.1.

    Raises:
        ConversionError: unknown method, options that contradict each other or the method, or a
            size that is impossible or larger than the dense layer.
    """
    options: dict[str, Any] = {
        "param_reduction": param_reduction,
        "bits": bits,
        "bits_per_weight": bits_per_weight,
        "num_codebooks": num_codebooks,
        "codebook_size": codebook_size,
    }
    check_size_options(method, **options, fine_share=fine_share)
    if method == "signs":
        bits = _sign_bits(vocab_size, hidden_size, param_reduction, bits, bits_per_weight)
        share = DEFAULT_FINE_SHARE if fine_share is None else fine_share
        size = HeadSize("sign", bits, 2, int(share * vocab_size))
    else:
        size = _index_size(
            method, vocab_size, hidden_size, param_reduction, num_codebooks, codebook_size
        )
    if method != "signs" and size.codebook_size > vocab_size:
        raise ConversionError(
            f"`codebook_size` {size.codebook_size} is larger than the vocabulary {vocab_size}: "
            f"more codewords than tokens cannot all be used. At most {vocab_size} can."
        )
    given = [f"`{name}` {value}" for name, value in options.items() if value is not None]
    chosen_by = " and ".join(given) or f"`param_reduction` {DEFAULT_REDUCTION} (the default)"
    # With K = V, which nobody asks for by accident, one codebook is the dense layer, lossless.
    if not (size.num_codebooks == 1 and codebook_size is not None):
        check_smaller_than_dense(size, vocab_size, hidden_size, chosen_by)
    return size


def check_smaller_than_dense(
    size: HeadSize, vocab_size: int, hidden_size: int, chosen_by: str
) -> None:
    """Compare in float32; in 16 bits the dense layer halves and the codes do not.

    Args:
        size: of the head.
        vocab_size: V.
        hidden_size: d.
        chosen_by: what asked for it, for the message.

    Raises:
        ConversionError: the head would be the larger one.
    """
    head = size.stored_bytes(vocab_size, hidden_size, FLOAT32_BYTES)
    dense = vocab_size * hidden_size * FLOAT32_BYTES
    if head <= dense:
        return
    if 8 * size.code_bytes > MOST_BITS_PER_WEIGHT * hidden_size:
        what = f"codes of more than {MOST_BITS_PER_WEIGHT} bits a weight"
    else:
        what = f"codes and {size.stored_codewords} codewords"
    raise ConversionError(
        f"{chosen_by} makes {what} at hidden size {hidden_size}: the head would be larger than "
        f"the dense layer ({head:,} bytes against {dense:,} in float32). Choose a "
        "smaller one, for instance with a `param_reduction` nearer to 1."
    )


def check_size_options(
    method: str,
    *,
    param_reduction: float | None = None,
    bits: int | None = None,
    bits_per_weight: float | None = None,
    num_codebooks: int | None = None,
    codebook_size: int | None = None,
    fine_share: float | None = None,
) -> None:
    """Check the options of [`choose_size`] as far as that needs no model.

    Raises:
        ConversionError: unknown method, a value that no model allows, or options that contradict
            each other or the method.
    """
    if method not in METHODS:
        raise ConversionError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    ways = {"param_reduction": param_reduction, "bits": bits, "bits_per_weight": bits_per_weight}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConversionError(
            f"`{given[0]}` and `{given[1]}` both choose the size; give one of them."
        )
    if param_reduction is not None:
        _check_reduction(param_reduction)
    if bits_per_weight is not None and not 0 < bits_per_weight <= MOST_BITS_PER_WEIGHT:
        raise ConversionError(
            f"`bits_per_weight` must lie above 0 and be at most {MOST_BITS_PER_WEIGHT}, got "
            f"{bits_per_weight}; usual are 0.5 to 2."
        )
    if fine_share is not None and not 0 <= fine_share <= 1:
        raise ConversionError(f"`fine_share` must lie between 0 and 1, got {fine_share}.")
    counts = {"bits": bits, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConversionError(f"`{name}` must be at least 1, got {value}.")
    if method == "signs":
        _refuse("signs", "`bits`", num_codebooks=num_codebooks, codebook_size=codebook_size)
    else:
        instead = "`num_codebooks` and `codebook_size`"
        _refuse(method, instead, bits=bits, bits_per_weight=bits_per_weight)
        if fine_share:
            raise ConversionError(
                f"`fine_share` does not apply to method {method!r}: second codes go with 'signs'."
            )
        _check_index_options(method, param_reduction, num_codebooks, codebook_size)


def _check_reduction(reduction: float) -> None:
    if not 0 < reduction < 1:
        raise ConversionError(
            f"`param_reduction` must lie between 0 and 1 (exclusive), got {reduction}; 0.98 keeps "
            "2% of the output layer's parameters."
        )


def _refuse(method: str, instead: str, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConversionError(
                f"`{name}` does not apply to method {method!r}; use {instead} or `param_reduction`."
            )


def _check_index_options(
    method: str,
    param_reduction: float | None,
    num_codebooks: int | None,
    codebook_size: int | None,
) -> None:
    if method in SINGLE_CODEBOOK:
        if num_codebooks not in (None, 1):
            raise ConversionError(
                f"Method {method!r} has one codebook, but `num_codebooks` is {num_codebooks}; use "
                "method 'residual' for several."
            )
        num_codebooks = 1
    if None not in (param_reduction, num_codebooks, codebook_size):
        raise ConversionError(
            f"`param_reduction` {param_reduction} and `codebook_size` {codebook_size} with "
            f"{num_codebooks} codebook(s) both choose the size; give one or the other."
        )


def _sign_bits(
    vocab_size: int,
    hidden_size: int,
    param_reduction: float | None,
    bits: int | None,
    bits_per_weight: float | None,
) -> int:
    if bits is not None:
        return bits
    if bits_per_weight is None:
        reduction = DEFAULT_REDUCTION if param_reduction is None else param_reduction
        return codewords_within(reduction, vocab_size, hidden_size)
    terms = round(bits_per_weight * hidden_size)
    if terms < 1:
        raise ConversionError(
            f"`bits_per_weight` {bits_per_weight} is less than one bit a token at hidden size "
            f"{hidden_size}; the least is {1 / hidden_size:.4f}."
        )
    return terms


def _index_size(
    method: str,
    vocab_size: int,
    hidden_size: int,
    param_reduction: float | None,
    num_codebooks: int | None,
    codebook_size: int | None,
) -> HeadSize:
    if method in SINGLE_CODEBOOK:
        num_codebooks = 1
    if num_codebooks is not None and codebook_size is not None:
        return HeadSize("index", num_codebooks, codebook_size)
    reduction = DEFAULT_REDUCTION if param_reduction is None else param_reduction
    codewords = codewords_within(reduction, vocab_size, hidden_size)
    if num_codebooks is None:
        codebook_size = codebook_size or min(RESIDUAL_CODEBOOK_SIZE, codewords)
        num_codebooks = codewords // codebook_size
    else:
        codebook_size = codewords // num_codebooks
    if num_codebooks < 1 or codebook_size < 1:
        raise ConversionError(
            f"`param_reduction` {reduction} leaves {codewords} codewords, too few for "
            f"`num_codebooks` {num_codebooks or '(any)'} and `codebook_size` "
            f"{codebook_size or '(any)'}."
        )
    return HeadSize("index", num_codebooks, codebook_size)

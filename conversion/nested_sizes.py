"""Several sizes in one checkpoint: from reductions to a size that holds smaller ones."""

from collections.abc import Sequence

from .errors import ConversionError
from .sizes import HeadSize, check_smaller_than_dense, choose_size


def check_nested(
    nested: Sequence[float],
    method: str,
    embeddings: str,
    *,
    ladder: bool = False,
    **others: float | None,
) -> None:
    """Check the option as far as that needs no model.

    Args:
        nested: shares of the V d parameters to save.
        method: of the conversion.
        embeddings: what becomes of the input embedding.
        ladder: sizes are to be compared.
        others: options that choose a size as well, None where they are not given.

    Raises:
        ConversionError: a value that no model allows, or options that contradict each other.
    """
    if method != "signs":
        raise ConversionError(
            f"`nested` holds sign codes in one another; it does not apply to method {method!r}."
        )
    for name, value in others.items():
        if value is not None:
            raise ConversionError(f"`nested` and `{name}` both choose the size; give one of them.")
    if ladder:
        raise ConversionError(
            "`nested` and `ladder` contradict each other: the report compares the sizes that are "
            "nested. Give one of them."
        )
    if embeddings == "tied":
        raise ConversionError(
            "`nested` does not go with `embeddings` 'tied': the table that both sides share is of "
            "one size. Use 'vq' or 'keep'."
        )
    for reduction in nested:
        if not 0 < reduction < 1:
            raise ConversionError(
                f"`nested` must hold reductions between 0 and 1 (exclusive), got {reduction}."
            )
    for reduction in nested:
        if list(nested).count(reduction) > 1:
            raise ConversionError(f"`nested` holds {reduction} more than once; give it once.")
    if len(nested) < 2:
        raise ConversionError(
            f"`nested` must hold at least two reductions, got {list(nested)}; for one size use "
            "`param_reduction`."
        )


def choose_nested_size(
    nested: Sequence[float],
    *,
    vocab_size: int,
    hidden_size: int,
    fine_share: float | None = None,
) -> HeadSize:
    """The size of the smallest reduction, which holds those of the others.

    Args:
        nested: shares of the V d parameters to save, checked by [`check_nested`].
        vocab_size: V.
        hidden_size: d.
        fine_share: share of the tokens with a second code, the same ones at every size.

    Raises:
        ConversionError: a reduction cannot be reached, two of them give the same bits, or all
            codebooks together are larger than the dense layer.
    """
    sizes: list[HeadSize] = []
    for reduction in sorted(nested, reverse=True):
        try:
            size = choose_size(
                "signs",
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                param_reduction=reduction,
                fine_share=fine_share,
            )
        except ConversionError as error:
            raise ConversionError(f"`nested` holds {reduction}, but: {error}") from error
        if sizes and size.num_codebooks == sizes[-1].num_codebooks:
            raise ConversionError(
                f"`nested` holds {reduction} and a reduction that gives the same "
                f"{size.num_codebooks} bits a token with V = {vocab_size} and d = {hidden_size}; "
                "give others."
            )
        sizes.append(size)
    *smaller, full = sizes
    whole = full.holding(tuple(size.num_codebooks for size in smaller))
    check_smaller_than_dense(whole, vocab_size, hidden_size, f"`nested` {list(nested)}")
    return whole

"""Checks of the codes that a checkpoint brings, for the output layer and the input embedding."""

from torch import Tensor

WHERE_FROM = "the checkpoint is damaged or its config.json belongs to another model."


def check_padding(name: str, codes: Tensor | None, num_codebooks: int) -> None:
    """Check that sign codes (n, ceil(R / 8)) set no bit above R.

    Args:
        name: for the message.
        codes: the codes, or None.
        num_codebooks: R.

    Raises:
        ValueError: names the first row that does.
    """
    used = num_codebooks % 8
    if codes is None or not used:
        return
    wrong = codes[:, -1] >> used
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` sets bits above the {num_codebooks} of `num_codebooks`, first in row "
            f"{int(wrong.nonzero()[0])}: {WHERE_FROM}"
        )


def check_fine_ids(fine_ids: Tensor | None, vocab_size: int) -> None:
    """Check which tokens have a second code: different ones of the vocabulary, ascending.

    Raises:
        ValueError: says what is wrong with them.
    """
    if fine_ids is None:
        return
    wrong = fine_ids[(fine_ids < 0) | (fine_ids >= vocab_size)]
    if len(wrong) or bool((fine_ids.diff() <= 0).any()):
        what = f"holds {int(wrong[0])}" if len(wrong) else "is not in ascending order"
        raise ValueError(
            f"`fine_ids` {what}, but must name {len(fine_ids)} different tokens of the vocabulary "
            f"of {vocab_size} in ascending order: {WHERE_FROM}"
        )


def fine_codes_below(
    fine_ids: Tensor | None, fine_codes: Tensor | None, vocab_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Second codes of the tokens that a smaller vocabulary still has; None where none has one."""
    if fine_ids is None or fine_codes is None:
        return None, None
    kept = fine_ids < vocab_size
    if not bool(kept.any()):
        return None, None
    return fine_ids[kept], fine_codes[kept]

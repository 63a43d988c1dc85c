"""Which peers are measured, in which settings, full and quick.

A family is a function that yields a setting and the layer that it makes, one after the other, so
that each can be timed and none needs to be kept.
"""

from collections.abc import Callable, Iterator

from hf_vqlogits.conversion.streaming import hidden_states

from .dense import bfloat16
from .faiss_codes import product_codes, residual_codes
from .frequent import frequent_rows, splits
from .gptq import gptq
from .grid import round_to_nearest
from .hqq_weights import hqq_weights
from .layer import Compressed, Layer
from .low_rank import low_rank
from .nf4_weights import nf4_weights
from .torchao_weights import torchao_weights
from .vector_codes import fitted_head, full_precision, half_precision

Settings = Iterator[tuple[str, Compressed]]
OURS = "sign codes"
KEPT_PERCENT = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SPLIT_POSITIONS = 16_384  # of the calibration text, for the constants of truncation
LEAST_FREQUENCY = 1e-3  # positions: as the fit's own importance counts tokens never made likely


def sign_codes(layer: Layer, quick: bool) -> Settings:
    """Ours; each size twice, for a file in bfloat16 and one in float32."""
    for percent in (0.25, 1.0) if quick else KEPT_PERCENT:
        head = fitted_head(layer, "signs", 1 - percent / 100)
        error = layer.quantiser.details[f"signs {head.num_codebooks}"]["error"]
        yield f"{percent:g}% kept", half_precision(head, error=error)
        yield f"{percent:g}% kept, float32 codewords", full_precision(head, error=error)


def kmeans(layer: Layer, quick: bool) -> Settings:
    """The paper's single codebook."""
    for percent in (1.0,) if quick else (0.5, 1.0, 4.0, 16.0):
        head = fitted_head(layer, "kmeans", 1 - percent / 100)
        yield f"K = {head.codebook_size}", half_precision(head)


def index_codes(layer: Layer, quick: bool) -> Settings:
    """Several index codebooks in the metric of the logits."""
    sizes = ((1.0, 4), (2.0, 4), (4.0, 4), (2.0, 16), (4.0, 16))
    for percent, words in ((0.25, 4),) if quick else sizes:
        head = fitted_head(layer, "residual", 1 - percent / 100, codebook_size=words)
        yield f"G = {head.num_codebooks}, K = {words}", half_precision(head)


def plain_low_rank(layer: Layer, quick: bool) -> Settings:
    """SVD of the weights."""
    for part in (8,) if quick else (16, 8, 4, 2):
        rank = layer.weight.shape[1] // part
        yield f"rank {rank}", low_rank(layer.weight, rank)


def whitened_low_rank(layer: Layer, quick: bool) -> Settings:
    """SVD in the metric of the logits' mean square."""
    moment = layer.second_moment()
    for part in (8, 2) if quick else (16, 8, 4, 2):
        rank = layer.weight.shape[1] // part
        yield f"rank {rank}", low_rank(layer.weight, rank, moment)


def torchao(layer: Layer, quick: bool) -> Settings:
    """Its integers, weight-only."""
    yield "int8, scale a row", torchao_weights(layer.weight, 8)
    size = layer.weight.shape[1]
    for group in (64,) if quick else (128, 64, 32):
        if size % group == 0:  # it takes no other
            yield f"int4, groups of {group}", torchao_weights(layer.weight, 4, group=group)


def hqq(layer: Layer, quick: bool) -> Settings:
    """Half-quadratic quantisation."""
    for bits in (2, 4):
        yield f"{bits} bit, groups of 64", hqq_weights(layer.weight, bits)


def nf4(layer: Layer, quick: bool) -> Settings:
    """The NormalFloat of bitsandbytes."""
    for nested in (True,) if quick else (False, True):
        scales = "nested" if nested else "float32"
        yield f"blocks of 64, {scales} scales", nf4_weights(layer.weight, nested=nested)


def nearest(layer: Layer, quick: bool) -> Settings:
    """Round to nearest, from the least to the largest weight of a group."""
    for bits in (2, 3, 4):
        yield f"{bits} bit, groups of 64", round_to_nearest(layer.weight, bits)


def searched(layer: Layer, quick: bool) -> Settings:
    """Round to nearest, in ranges of least squared error."""
    for bits in (2,) if quick else (2, 3, 4):
        yield f"{bits} bit, groups of 64", round_to_nearest(layer.weight, bits, search=True)


def gptq_weights(layer: Layer, quick: bool) -> Settings:
    """GPTQ with our calibration's second moment."""
    moment = layer.second_moment()
    for bits in (2, 3, 4):
        yield f"{bits} bit, groups of 64", gptq(layer.weight, moment, bits)


def faiss_product(layer: Layer, quick: bool) -> Settings:
    """Product quantisation of the rows."""
    for width in (8, 4) if quick else (16, 8, 4, 2):
        made = product_codes(layer.weight, width, seed=layer.quantiser.seed)
        yield f"{layer.weight.shape[1] // width} x 8 bit", made


def faiss_residual(layer: Layer, quick: bool) -> Settings:
    """Residual quantisation of the rows."""
    for part in (8,) if quick else (16, 8, 4):
        books = layer.weight.shape[1] // part
        yield f"{books} x 4 bit", residual_codes(layer.weight, books, seed=layer.quantiser.seed)


def truncation(layer: Layer, quick: bool) -> Settings:
    """Rows of the most frequent tokens only."""
    vocab_size = len(layer.weight)
    frequency = layer.statistics.probability.clamp_min(LEAST_FREQUENCY)
    order = frequency.argsort(descending=True, stable=True)
    kept = [order[: vocab_size // part] for part in ((16, 4) if quick else (64, 32, 16, 8, 4, 2))]
    blocks = layer.case.calibration
    step = max(1, blocks.numel() // SPLIT_POSITIONS)
    states = (h for h, _ in hidden_states(layer.case.parts.backbone, blocks[::step]))
    for tokens, split in zip(kept, splits(states, layer.weight, kept), strict=True):
        yield f"{len(tokens)} rows", frequent_rows(layer.weight, frequency, tokens, split)


def dense(layer: Layer, quick: bool) -> Settings:
    """The baseline."""
    yield "bfloat16", bfloat16(layer.weight)


FAMILIES: dict[str, Callable[[Layer, bool], Settings]] = {
    OURS: sign_codes,
    "the paper's k-means, G = 1": kmeans,
    "index codes": index_codes,
    "dense": dense,
    "torchao": torchao,
    "HQQ": hqq,
    "bitsandbytes nf4": nf4,
    "GPTQ": gptq_weights,
    "round to nearest": nearest,
    "round to nearest, searched ranges": searched,
    "low rank": plain_low_rank,
    "low rank, whitened": whitened_low_rank,
    "faiss product quantisation": faiss_product,
    "faiss residual quantisation": faiss_residual,
    "most frequent rows": truncation,
}

"""The command `convert_to_vq`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from hf_vqlogits.configuration_vqlogits import EMBEDDINGS
from hf_vqlogits.gates import ACTIVATIONS, LINEAR

from .convert import convert_to_vq
from .corpus import CALIBRATION_TOKENS, SELF_TOKENS
from .errors import ConversionError
from .options import DISTILL_STEPS, INPUT_DISTILL_STEPS, REFINE_AGREEMENT
from .quantise import REREADINGS
from .sizes import DEFAULT_FINE_SHARE, DEFAULT_REDUCTION, METHODS


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`.\n")


def parser() -> argparse.ArgumentParser:
    """The options; their names with underscores are the keywords of the Python call."""
    p = OneLineParser(
        prog="convert_to_vq",
        description="Replace the output layer of a causal language model by a vector-quantised "
        "one: a small codebook and a code per token.",
    )
    p.add_argument("--model", required=True, help="name on the hub, or a folder")
    p.add_argument("--gguf-file", help="load this GGUF file of the model's folder")
    p.add_argument("--output", help="folder to write; default: ./NAME-vq")
    p.add_argument(
        "--method",
        default="signs",
        choices=METHODS,
        help="signs: a signed sum of shared vectors, one bit each (default); residual: several "
        "index codebooks; kmeans, random, contiguous, frequency: the VQ-Logits paper's single "
        "codebook and its initialisations",
    )
    size = p.add_argument_group("size (one of)")
    size.add_argument(
        "--param-reduction",
        type=float,
        help=f"share of the output layer's parameters to save; default {DEFAULT_REDUCTION}",
    )
    size.add_argument("--bits", type=int, help="bits a token (signs)")
    size.add_argument("--bits-per-weight", type=float, help="bits a token over d (signs)")
    size.add_argument(
        "--max-perplexity-increase",
        metavar="SHARE",
        type=float,
        help="the smallest head that raises the perplexity by at most this share, 0.02 for 2%% "
        "(signs)",
    )
    size.add_argument(
        "--nested",
        type=_reductions,
        metavar="SHARE,SHARE",
        help="several shares to save; the smallest is the size that is written, and it holds the "
        "others, each of which can be loaded (signs); takes the time of as many conversions",
    )
    size.add_argument("--num-codebooks", type=int, help="codebooks (residual)")
    size.add_argument("--codebook-size", type=int, help="codewords of a codebook (index codes)")
    p.add_argument(
        "--fine-share",
        type=float,
        help="share of the tokens that have a second code, those that count most (signs); default "
        f"{DEFAULT_FINE_SHARE}",
    )
    text = p.add_argument_group("text")
    text.add_argument(
        "--calibration-data",
        help="text file, folder, .gz, name of a dataset, or 'self': text that the model writes; "
        "default: WikiText-2, and 'self' where it cannot be had",
    )
    text.add_argument(
        "--calibration-tokens",
        type=int,
        help=f"how many of them at most; default {CALIBRATION_TOKENS:,}, or {SELF_TOKENS:,} of the "
        "model's own text",
    )
    text.add_argument(
        "--rereadings",
        type=int,
        default=REREADINGS,
        help="how often the calibration text is read again, each time with half of its tokens "
        f"replaced by others that the model expects; default {REREADINGS}",
    )
    text.add_argument(
        "--eval-data",
        help="likewise, of a data set the split `test`; default: a held-out fifth of the "
        "calibration text",
    )
    p.add_argument(
        "--distill-steps",
        type=int,
        help="steps, of about 1,000 tokens, of training towards the dense layer; default "
        f"{DISTILL_STEPS} for signs, else 0",
    )
    p.add_argument(
        "--distill-state",
        metavar="FILE",
        help="keep the state of the distillation, so that the same command goes on after an "
        "interrupt; removed at the end; with --nested or --max-perplexity-increase one file for "
        "each size, its bits behind the name",
    )
    p.add_argument(
        "--embeddings",
        default="keep",
        choices=EMBEDDINGS,
        help="keep: the input embedding stays dense (default); vq: it gets codes and a codebook of "
        "its own; tied: those of the output layer, in models whose two sides are one table",
    )
    p.add_argument(
        "--embedding-bits",
        type=int,
        help="bits a token of the input embedding (vq); default: those of the output layer",
    )
    p.add_argument(
        "--input-distill-steps",
        type=int,
        help="steps, of about 1,000 tokens, of training the codebooks of both sides through the "
        f"body (vq, tied); default {INPUT_DISTILL_STEPS} for signs, else 0",
    )
    p.add_argument(
        "--body-distill-steps",
        type=int,
        default=0,
        help="steps, of about 1,000 tokens, of training the whole model, its body too, towards the "
        "original; default 0",
    )
    p.add_argument(
        "--num-mixtures",
        metavar="M",
        type=int,
        default=1,
        help="split the finished output layer into a mixture of M softmaxes over its codebook, and "
        "distil that as well; default 1, none",
    )
    p.add_argument(
        "--gate-activation",
        default=LINEAR,
        choices=ACTIVATIONS,
        help=f"of the mixture's gate; default {LINEAR}",
    )
    p.add_argument(
        "--gate-temperature",
        type=float,
        default=1.0,
        help="of the mixture's gate: large shares every position among all, small chooses one; "
        "default 1",
    )
    p.add_argument(
        "--refine-top-k",
        metavar="T",
        type=int,
        default=0,
        help="score so many tokens of the largest logits again by rows of the dense output layer, "
        "which stay in the model for it (in tied models they are the input embedding's)",
    )
    p.add_argument(
        "--refine-agreement",
        metavar="SHARE",
        type=float,
        default=REFINE_AGREEMENT,
        help="share of the positions where the dense layer's most likely token is to be found; "
        f"fewer tokens are scored for a smaller one; default {REFINE_AGREEMENT}",
    )
    p.add_argument("--ladder", action="store_true", help="compare fits at 99.5, 99, 98 and 96%%")
    p.add_argument("--device", help="default: a GPU when there is one")
    p.add_argument("--dtype", help="type of the weights; default: as stored")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    p.add_argument("--json", action="store_true", help="print the report as JSON")
    p.add_argument("--push-to-hub", metavar="REPO", help="upload the output to this repository")
    return p


def _reductions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"shares must be numbers with commas between them, as in 0.99,0.98; got {text!r}"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 2 after a mistake of the user's, told in one line; 130 after an interrupt.
    """
    options = vars(parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    model, as_json = options.pop("model"), options.pop("json")
    options["output"] = options["output"] or f"{Path(os.path.abspath(model)).name}-vq"
    before = _identity(options["output"])
    try:
        report = convert_to_vq(model, progress=True, **options)
        if as_json:
            sys.stdout.write(report.to_json())
        else:
            report.print()
    except ConversionError as error:
        print("convert_to_vq: error:", *str(error).split(), file=sys.stderr)  # in one line
        return 2
    except KeyboardInterrupt:
        found = _identity(options["output"])
        if found not in (None, before):
            written = f"the output {options['output']!r} was already written, and is complete"
        else:
            written = "nothing was written" + (", the earlier output is as it was" if found else "")
        print(f"convert_to_vq: interrupted; {written}", file=sys.stderr)
        return 130
    return 0


def _identity(folder: str) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None where there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino

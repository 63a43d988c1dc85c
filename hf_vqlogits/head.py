"""The vector-quantised output layer.

Letters, here and everywhere: N rows (positions), V vocabulary, d hidden size, G codebooks,
K codewords each, R bits a token.

A small matrix product gives scores, and a token's logit is a sum of the scores that its code
names, without a multiplication per token:

    index codes   logits[n, v] = sum_g scores[n, g, codes[v, g]]
    sign codes    logits[n, v] = sum_r s[v, r] scores[n, r],  s = +1 or -1

Frequent tokens may have a second sign code s' of half the weight, s + s' / 2 in the place of s: it
costs such a token R bits more and no codeword.

With scores = score_scale (hidden . codebook + codebook_bias) and score_scale about 1 / G (1 / R):
a token's output vector is the mean of the codewords that its code names. Were it their sum, a step
of Adam, which moves every codeword by the learning rate, would move it up to G (R) times as far as
a row of a dense layer. G = 1 is the VQ-Logits paper's layer.

A head of sign codes may hold smaller ones (`nested.py`): their codes are the first bits, and each
has a codebook of its own, which is no parameter and takes no part until the head is cut to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .coded import WHERE_FROM, CodedLayer, score_scale
from .configuration_vqlogits import OUTPUT_LOSSES
from .nested import check_stored, cut_codes
from .ops import eager
from .sampling import sample


class HeadConfig(Protocol):
    """The fields that a head reads; [`VQLogitsConfig`] has them."""

    code_type: str
    num_codebooks: int
    codebook_size: int
    num_fine_tokens: int
    logit_scale: float
    final_logit_softcapping: float | None

    @property
    def nested_codebooks(self) -> Sequence[int]:
        """R of the smaller heads inside, ascending."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        ...


class VQLogitsHead(CodedLayer):
    """Output layer whose V x d weight is a small codebook and a code per token.

    Equivalent to `nn.Linear` with `weight, bias = head.to_linear()`, followed by the scale and
    soft-cap of the configuration, at a fraction of the memory and time.

    Attributes:
        codebook: parameter, sign codes (R, d), index codes (G, K, d).
        codebook_bias: parameter, sign codes (R,), index codes (G, K).
        score_scale: the power of two nearest to 1 / G (1 / R for sign codes), by which scores are
            multiplied; a power of two costs no digit (but of subnormal float16 numbers).
        nested_codebooks: R of the smaller heads inside, ascending. The one of r bits has the
            buffers `codebook_{r}` (r, d) and `codebook_bias_{r}` (r,), in units of its own
            `score_scale`.
        codes: buffer, sign codes uint8 (V, ceil(R / 8)), bit r of a token in bit r % 8 of byte
            r // 8, 1 meaning +1; index codes (V, G), uint8 up to K = 256, else int32.
        fine_codes: buffer uint8 (F, ceil(R / 8)), second sign codes of F tokens; None without.
        fine_ids: buffer int32 (F,), which tokens, ascending; None without.
        hidden_mean: buffer (d,), mean hidden state of the calibration text, zero without one.
        fold_direction: buffer (d,), u = E[h h^T]^-1 E[h] of the calibration text: the direction
            along which `bias * u` in the weights is the least-squares substitute of a bias.

    Args:
        config: a [`VQLogitsConfig`], or any object with the fields of [`HeadConfig`].

    Example:
        >>> from transformers import GPT2Config
        >>> from hf_vqlogits import VQLogitsConfig
        >>> head = VQLogitsHead(VQLogitsConfig(text_config=GPT2Config(), num_codebooks=500))
        >>> head(torch.randn(2, 3, 768)).shape
        torch.Size([2, 3, 50257])
    """

    hidden_mean: Tensor
    fold_direction: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        self._register(config)
        self.reset_parameters()

    def _register(self, config: HeadConfig) -> None:
        """All parameters, buffers and sizes, the tensors not yet filled."""
        self.code_type = config.code_type
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.score_scale = score_scale(config.num_codebooks)
        self.in_features = config.hidden_size
        self.num_mixtures = 1
        self.logit_scale = config.logit_scale
        self.final_logit_softcapping = config.final_logit_softcapping
        if self.code_type == "sign":
            shape: tuple[int, ...] = (self.num_codebooks,)
            codes = torch.empty(config.vocab_size, -(-self.num_codebooks // 8), dtype=torch.uint8)
        else:
            shape = (self.num_codebooks, self.codebook_size)
            # No 16-bit codes: gloo refuses such buffers, and PyTorch cannot index with them.
            dtype = torch.uint8 if self.codebook_size <= 256 else torch.int32
            codes = torch.empty(config.vocab_size, self.num_codebooks, dtype=dtype)
        self.codebook = nn.Parameter(torch.empty(*shape, self.in_features))
        self.codebook_bias = nn.Parameter(torch.empty(*shape))
        self.nested_codebooks = list(config.nested_codebooks)
        for bits in self.nested_codebooks:
            self.register_buffer(f"codebook_{bits}", torch.empty(bits, self.in_features))
            self.register_buffer(f"codebook_bias_{bits}", torch.empty(bits))
        self._register_codes(codes, config.num_fine_tokens)
        self.register_buffer("hidden_mean", torch.empty(self.in_features))
        self.register_buffer("fold_direction", torch.empty(self.in_features))

    @property
    def out_features(self) -> int:
        """V."""
        return self.codes.shape[0]

    def initial_tensors(self, *, common: float | None = None) -> dict[str, Tensor]:
        """Random tensors of a head to be trained from scratch, by name, drawn on the CPU.

        Codes are uniform, second codes are of the first tokens; codewords are normal with the
        deviation that gives logits the variance of a dense layer initialised at 0.02.

        Args:
            common: all logits shall be near this number, by a codeword that all tokens share: bit 0
                of sign codes, or codebook 0 of index codes as a whole. Random codes can learn no
                number that all tokens have in common.
        """
        if self.code_type == "sign":
            codes = self._initial_sign_codes()
        else:
            shape = tuple(self.codes.shape)
            drawn = torch.randint(0, self.codebook_size, shape, device="cpu")
            codes = {"codes": drawn.to(self.codes.dtype)}
        nested = {}
        for bits in self.nested_codebooks:
            nested[f"codebook_{bits}"] = self._initial_codebook(bits)
            nested[f"codebook_bias_{bits}"] = torch.zeros(bits, device="cpu")
        tensors = {
            "codebook": self._initial_codebook(),
            "codebook_bias": torch.zeros(self.codebook_bias.shape, device="cpu"),
            **nested,
            **codes,
            "hidden_mean": torch.zeros(self.in_features, device="cpu"),
            "fold_direction": torch.zeros(self.in_features, device="cpu"),
        }
        if common is not None:
            self._share_a_codeword(tensors, common)
        return tensors

    def _share_a_codeword(self, tensors: dict[str, Tensor], common: float) -> None:
        """Give all tokens a number in common, in place."""
        sizes = {"": self.num_codebooks, **{f"_{bits}": bits for bits in self.nested_codebooks}}
        for which, terms in sizes.items():
            tensors[f"codebook_bias{which}"][0] = common / score_scale(terms)
            if self.code_type == "sign":
                tensors[f"codebook{which}"][0] = 0.0
        if self.code_type == "sign":
            tensors["codes"][:, 0] |= 1

    def hold(self, smaller: "VQLogitsHead") -> None:
        """Take the codebook of a smaller head whose codes are the first bits of this one's.

        Args:
            smaller: of sign codes; its size is one of `nested_codebooks`.

        Raises:
            ValueError: this head has no room for that size, or its codes are other ones, or other
                tokens have second ones.
        """
        bits = smaller.num_codebooks
        if bits not in self.nested_codebooks:
            raise ValueError(
                f"The head has no room for a smaller one of {bits} bits: `nested_codebooks` is "
                f"{self.nested_codebooks}."
            )
        own, held = self._first_bits(bits), smaller._first_bits(bits)
        same = len(own) == len(held)
        if not (same and all(torch.equal(a, b) for a, b in zip(own, held, strict=True))):
            raise ValueError(
                f"The codes of the smaller head are not the first {bits} bits of this one's."
            )
        setattr(self, f"codebook_{bits}", smaller.codebook.detach().clone())
        setattr(self, f"codebook_bias_{bits}", smaller.codebook_bias.detach().clone())

    def _first_bits(self, bits: int) -> list[Tensor]:
        """All that says which codes tokens have, of so many bits."""
        found = [cut_codes(self.codes, bits)]
        if self.fine_ids is not None and self.fine_codes is not None:
            found += [cut_codes(self.fine_codes, bits), self.fine_ids]
        return found

    @torch.no_grad()
    def keep_codebooks(self, num_codebooks: int) -> None:
        """Become, in place, the smaller head of that many bits; larger ones are dropped.

        Codebook and biases are new parameters, so call it before an optimiser is made.

        Args:
            num_codebooks: one of `nested_codebooks`, or R, which changes nothing.

        Raises:
            ValueError: the size is not stored; names those that are.
        """
        check_stored(num_codebooks, [*self.nested_codebooks, self.num_codebooks], "the head")
        if num_codebooks == self.num_codebooks:
            return
        for name in ("codebook", "codebook_bias"):
            values, trained = getattr(self, f"{name}_{num_codebooks}"), getattr(self, name)
            setattr(self, name, nn.Parameter(values, requires_grad=trained.requires_grad))
        self.codes = cut_codes(self.codes, num_codebooks)
        if self.fine_codes is not None:
            self.fine_codes = cut_codes(self.fine_codes, num_codebooks)
        for bits in [bits for bits in self.nested_codebooks if bits >= num_codebooks]:
            self.nested_codebooks.remove(bits)
            delattr(self, f"codebook_{bits}")
            delattr(self, f"codebook_bias_{bits}")
        self.num_codebooks = num_codebooks
        self.score_scale = score_scale(num_codebooks)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Scores of the codewords: (N, d) -> (N, R) for sign codes, (N, G, K) for index codes."""
        return ops.scores(hidden_states, self.codebook, self.codebook_bias, scale=self.score_scale)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        num_items_in_batch: int | Tensor | None = None,
        output_loss: str = "cross_entropy",
    ) -> Tensor:
        """Logits, or with `labels` the loss, which never builds the N x V logits.

        Everything that needs the head's tensors comes through here, because the hooks of FSDP,
        Accelerate and PEFT fire only on `forward`.

        Args:
            hidden_states: (..., d).
            labels: (...), the token to be predicted at every position (already shifted), or None.
            reduction: `"mean"` over the positions that count, `"sum"`, or `"none"` for (...).
            ignore_index: label of the positions that do not count.
            label_smoothing: as in `torch.nn.functional.cross_entropy`.
            z_loss: weight of logsumexp(logits)^2 in the loss of every position.
            num_items_in_batch: with `"mean"`, divide the sum by this number instead.
            output_loss: `"cross_entropy"`, or `"squared_hinge"`: the sum over all tokens of
                max(0, 1 - y logit)^2, y = +1 for the label and -1 for the others, which takes
                neither `label_smoothing` nor `z_loss`. It wants logits of -1 for nearly all tokens;
                softmax does not see such a constant, and sign codes can give one only by a bit
                that all tokens share.

        Returns:
            Logits (..., V) in the type of the scores; with `labels` the loss, float32, which as
            cross-entropy is in nats.

        Raises:
            ValueError: the last dimension of `hidden_states` is not d, `labels` has another shape
                than the positions, or an option is not one of `output_loss`.
        """
        self._check_width(hidden_states)
        positions = hidden_states.shape[:-1]
        rows = hidden_states.reshape(-1, self.in_features)
        if labels is None:
            return self._logits(rows).view(*positions, self.out_features)
        if labels.shape != positions:
            raise ValueError(
                f"`labels` must have the shape of the positions {tuple(positions)}, got "
                f"{tuple(labels.shape)}."
            )
        if output_loss not in OUTPUT_LOSSES:
            raise ValueError(f"`output_loss` must be one of {OUTPUT_LOSSES}, got {output_loss!r}.")
        loss = self._loss(
            rows,
            labels.reshape(-1),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            num_items_in_batch=num_items_in_batch,
            output_loss=output_loss,
        )
        return loss.view(positions) if reduction == "none" else loss

    def _logits(self, rows: Tensor) -> Tensor:
        """Final logits (N, V) of hidden states (N, d)."""
        logits = ops.logits(
            rows,
            codebook=self.codebook,
            codebook_bias=self.codebook_bias,
            scale=self.score_scale,
            **self._coded(),
        )
        return self.postprocess(logits)

    def _loss(self, rows: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """The loss of hidden states (N, d) and labels (N,), with all other options of `forward`."""
        return self._loss_by(self.codebook, self.codebook_bias, rows, labels, **options)

    def _loss_by(
        self,
        codebook: Tensor,
        codebook_bias: Tensor,
        rows: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float,
        z_loss: float,
        output_loss: str,
        **options: Any,
    ) -> Tensor:
        """The same by a codebook and biases in the place of the head's own."""
        loss: Callable[..., Tensor] = ops.linear_cross_entropy
        if output_loss == "squared_hinge":
            if label_smoothing or z_loss:
                raise ValueError(
                    "`label_smoothing` and `z_loss` are of the cross-entropy; with `output_loss` "
                    f"'squared_hinge' both must be 0, got {label_smoothing} and {z_loss}."
                )
            loss = ops.linear_squared_hinge
        else:
            options |= {"label_smoothing": label_smoothing, "z_loss": z_loss}
        return loss(
            rows,
            labels,
            codebook=codebook,
            codebook_bias=codebook_bias,
            score_scale=self.score_scale,
            logit_scale=self.logit_scale,
            final_logit_softcapping=self.final_logit_softcapping,
            **self._coded(),
            **options,
        )

    def _coded(self) -> dict[str, Any]:
        """The codes, as the operations take them."""
        return {
            "codes": self.codes,
            "code_type": self.code_type,
            "fine_ids": self.fine_ids,
            "fine_codes": self.fine_codes,
        }

    def topk(self, hidden_states: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of every position and their tokens, without the N x V logits.

        Without gradient, and by no hook of `forward`: a head that is sharded must be gathered
        before.

        Args:
            hidden_states: (..., d).
            k: 1 to V.

        Returns:
            Logits in float32, descending, and tokens int64, both (..., k).

        Raises:
            ValueError: `k` is not in 1..V, or the last dimension of `hidden_states` is not d.
        """
        self._check_width(hidden_states)
        values, tokens = ops.topk(
            hidden_states.reshape(-1, self.in_features),
            k,
            codebook=self.codebook,
            codebook_bias=self.codebook_bias,
            scale=self.score_scale,
            **self._coded(),
        )
        shape = (*hidden_states.shape[:-1], k)
        return self.postprocess(values).view(shape), tokens.view(shape)

    def argmax(self, hidden_states: Tensor) -> Tensor:
        """The most likely token of every position: (..., d) -> int64 (...), as [`topk`]."""
        return self.topk(hidden_states, 1)[1].squeeze(-1)

    def sample(
        self,
        hidden_states: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a token for every position: (..., d) -> int64 (...); see [`sampling.sample`]."""
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        self._check_width(hidden_states)
        return sample(self, hidden_states, **options, generator=generator)

    def _check_width(self, hidden_states: Tensor) -> None:
        if hidden_states.shape[-1] != self.in_features:
            raise ValueError(
                f"`hidden_states` must end in the hidden size {self.in_features}, got shape "
                f"{tuple(hidden_states.shape)}."
            )

    def postprocess(self, logits: Tensor) -> Tensor:
        """Logits (..., V) after the family's scale and soft-cap."""
        return ops.final_logits(logits, self.logit_scale, self.final_logit_softcapping)

    @torch.no_grad()
    def to_linear(self) -> tuple[Tensor, Tensor]:
        """The dense layer that this head stands for, without scale and soft-cap.

        Returns:
            `weight` (V, d) and `bias` (V,), in float32 or the codebook's type where that is wider:
            sums of R terms would lose digits in half precision.
        """
        columns = torch.cat([self.codebook, self.codebook_bias.unsqueeze(-1)], -1)
        columns = self.score_scale * columns.to(torch.promote_types(columns.dtype, torch.float32))
        # Codewords times codes is `expand` with the columns of the codebook as rows of scores; the
        # compiled kernels round to 16 bits what is to be exact here.
        dense = eager.expand(
            columns.movedim(-1, 0), self.codes, self.code_type, self.fine_ids, self.fine_codes
        )
        return dense[:-1].T.contiguous(), dense[-1].clone()

    def check_codes(self) -> None:
        """Check that the codes are possible ones.

        Raises:
            ValueError: an index code lies outside 0..K-1, a sign code sets a bit above R, or the
                tokens with a second code are not different ones of the vocabulary, ascending.
        """
        if self.code_type == "sign":
            self._check_sign_codes()
            return
        wrong = (self.codes.int() < 0) | (self.codes.int() >= self.codebook_size)
        if bool(wrong.any()):
            token, book = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`codes` of token {token} names codeword {int(self.codes[token, book])} of "
                f"codebook {book}, but `codebook_size` is {self.codebook_size} (codes run from 0 "
                f"to {self.codebook_size - 1}): {WHERE_FROM}"
            )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        nested = f", nested_codebooks={self.nested_codebooks}" if self.nested_codebooks else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"code_type={self.code_type}, num_codebooks={self.num_codebooks}, "
            f"codebook_size={self.codebook_size}, num_fine_tokens={self.num_fine_tokens}{nested}"
        )

    def storage(self) -> dict[str, Any]:
        """Sizes that every report quotes.

        Returns:
            `bits_per_token` (the mean, where some tokens have a second code), `bits_per_weight`
            (that over d), `float_parameters` (codebook, biases and what else is trained), and bytes
            by part:
            `codes_bytes` (with those of `fine_ids`), `codebook_bytes`, `nested_bytes` (codebooks
            of smaller heads inside), `total_bytes`.
        """
        if self.code_type == "sign":
            bits = self.num_codebooks * (1 + self.num_fine_tokens / self.out_features)
        else:
            bits = self.num_codebooks * (self.codebook_size - 1).bit_length()
        floats = [*self.parameters()]
        codebook_bytes = sum(t.numel() * t.element_size() for t in floats)
        nested_floats = sum(self.nested_codebooks) * (self.in_features + 1)
        nested_bytes = nested_floats * self.codebook.element_size()
        return {
            "bits_per_token": bits,
            "bits_per_weight": bits / self.in_features,
            "float_parameters": sum(t.numel() for t in floats),
            "codes_bytes": self.codes_bytes,
            "codebook_bytes": codebook_bytes,
            "nested_bytes": nested_bytes,
            "total_bytes": self.codes_bytes + codebook_bytes + nested_bytes,
        }

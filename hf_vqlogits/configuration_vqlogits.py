"""Configuration of a causal language model with a vector-quantised output layer."""

import itertools
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .gates import LINEAR, check_activation, check_temperature
from .ops.eager import CODE_TYPES

EMBEDDINGS = ("keep", "vq", "tied")
OUTPUT_LOSSES = ("cross_entropy", "squared_hinge")


@strict
class VQLogitsConfig(PreTrainedConfig):
    r"""Configuration of [`VQLogitsForCausalLM`]: any decoder's configuration plus that of its head.

    Letters: V vocabulary, d hidden size, G codebooks, K codewords each, R bits a token.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone, any decoder that `AutoModel` knows. V (`vocab_size`) and
            d (`hidden_size`) are read from it. Defaults to that of GPT-2.
        code_type (`str`, *optional*, defaults to `"sign"`):
            `"sign"`: a token's output vector is the signed mean of all R codewords, one bit each.
            `"index"`: it is the mean of one codeword out of K from each of G codebooks; G = 1 is
            the form of the VQ-Logits paper.
        num_codebooks (`int`, *optional*, defaults to 512):
            R for sign codes, G for index codes; at least 1.
        codebook_size (`int`, *optional*, defaults to 2):
            K: 2 for sign codes (+c and -c, of which only c is stored), 1 to V for index codes.
        num_fine_tokens (`int`, *optional*, defaults to 0):
            F, how many tokens have a second sign code, which counts half; 0 to V.
        nested_codebooks (`list[int]`, *optional*, defaults to `[]`):
            R of smaller heads inside, ascending and below `num_codebooks` (sign codes). Loading
            with `num_codebooks` as one of them gives that head.
        logit_scale (`float`, *optional*, defaults to 1.0):
            Factor that the family applies to its logits (Cohere's `logit_scale`, the inverse of
            Granite's `logits_scaling`).
        final_logit_softcapping (`float`, *optional*):
            The c of `c * tanh(logits / c)` (Gemma 2), applied after the scale.
        embeddings (`str`, *optional*, defaults to `"keep"`):
            The input embedding. `"keep"`: the backbone's own dense one. `"vq"`: sign codes and a
            codebook of its own. `"tied"`: the codes and codewords of the head, which must be sign
            codes; both are stored once.
        embedding_codebooks (`int`, *optional*):
            R of the input embedding, with `"vq"` only; defaults to that of a sign-coded head.
        embedding_fine_tokens (`int`, *optional*, defaults to 0):
            How many tokens have a second code there, with `"vq"` only.
        output_loss (`str`, *optional*, defaults to `"cross_entropy"`):
            The loss of training. `"squared_hinge"`: the margin loss of an L2-SVM, one against the
            rest: the sum over all tokens of max(0, 1 - y logit)^2, y = +1 for the label and -1 for
            the others (Agarap 2017). Logits are then margins around -1 and no longer
            log-probabilities; a head made with it has a codeword that all tokens share.
        num_mixtures (`int`, *optional*, defaults to 1):
            M: the distribution is a mixture of M softmaxes that share the codebook, and what the
            head returns are log-probabilities; see [`VQLogitsMixtureHead`]. 1 is one softmax.
        gate_activation (`str`, *optional*, defaults to `"linear"`):
            What the gate's linear part goes through before its bias is added: `"linear"`,
            `"sigmoid"`, `"tanh"`, `"gelu"` or `"silu"`. Without effect where M is 1.
        gate_temperature (`float`, *optional*, defaults to 1.0):
            What the gate's scores are divided by: large values share every position among all
            components, small ones choose one.
        refine_top_k (`int`, *optional*, defaults to 0):
            T, how many tokens of the largest quantised logits are scored again by rows of the dense
            output weight, outside of training; 0 to V, 0 without such rows. A checkpoint that has
            them can be loaded with another number.
        refine_deviations (`float`, *optional*):
            z: of these, only those that lie within z deviations of the logits' errors below the
            best one; None scores them all.
        refine_with_embedding (`bool`, *optional*, defaults to `False`):
            The dense output weight is the input embedding's, as in a tied dense model, with
            `embeddings` `"keep"`; else it is stored.
        tie_word_embeddings (`bool`, *optional*):
            Follows `embeddings`: True exactly with `"tied"`, as Transformers ties tensors only of
            models that say so. That of `text_config` says what the dense model did.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.

    Example:
        >>> from transformers import GPT2Config
        >>> config = VQLogitsConfig(text_config=GPT2Config(), num_codebooks=500)
        >>> config.vocab_size, config.hidden_size
        (50257, 768)
    """

    model_type = "vqlogits"
    sub_configs_defaults = {  # noqa: RUF012 - Transformers declares it as a ClassVar
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")
    }
    # The backbone brings its own plan; the default one names layers that this model has not.
    base_model_fsdp_plan = {}  # noqa: RUF012 - as above

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    code_type: str = "sign"
    num_codebooks: int = 512
    codebook_size: int = 2
    num_fine_tokens: int = 0
    nested_codebooks: list[int] | tuple[int, ...] = ()
    logit_scale: float | int = 1.0
    final_logit_softcapping: float | int | None = None
    embeddings: str = "keep"
    embedding_codebooks: int | None = None
    embedding_fine_tokens: int = 0
    output_loss: str = "cross_entropy"
    num_mixtures: int = 1
    gate_activation: str = LINEAR
    gate_temperature: float | int = 1.0
    refine_top_k: int = 0
    refine_deviations: float | int | None = None
    refine_with_embedding: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the fields and check them.

        The strict dataclass repeats the check, but wraps what it raises in an error of its own
        that is no `ValueError`.
        """
        for name in ("vocab_size", "hidden_size"):
            if name in kwargs:
                raise ValueError(
                    f"`{name}` is a field of `text_config` and not of `VQLogitsConfig`. A "
                    "config.json that holds it is not of a VQ-Logits checkpoint: convert the model "
                    "with `convert_to_vq` first."
                )
        self.nested_codebooks = list(self.nested_codebooks)
        self.tie_word_embeddings = self.tie_word_embeddings or self.embeddings == "tied"
        sign_head = self.code_type == "sign"
        if self.embeddings == "vq" and self.embedding_codebooks is None and sign_head:
            self.embedding_codebooks = self.num_codebooks
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it as [`PreTrainedConfig.from_dict`] does; a smaller size given holds less."""
        made = super().from_dict(config_dict, **kwargs)
        config: VQLogitsConfig = made[0] if isinstance(made, tuple) else made
        config.keep_codebooks(config.num_codebooks)
        return made

    def keep_codebooks(self, num_codebooks: int) -> None:
        """Describe the head of so many codebooks, with what that can hold inside."""
        self.num_codebooks = num_codebooks
        self.nested_codebooks = [bits for bits in self.nested_codebooks if bits < num_codebooks]

    @property
    def vocab_size(self) -> int:
        """V, read from `text_config`."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states that reach the head, read from `text_config`.

        OPT projects its hidden states to `word_embed_proj_dim` before the output layer.
        """
        text_config = self.get_text_config()
        return getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size

    @property
    def use_cache(self) -> bool:
        """Whether the backbone returns its cache, read from and written to `text_config`.

        Trainer and many scripts switch it here.
        """
        return getattr(self.get_text_config(), "use_cache", True)

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.get_text_config().use_cache = value

    def validate_architecture(self) -> None:
        """Check the head's fields against each other and against the backbone's.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        if self.get_text_config().is_encoder_decoder:
            raise ValueError(
                "`text_config` must describe a decoder, got the encoder-decoder "
                f"{self.get_text_config().model_type!r}, which this package does not support."
            )
        if self.code_type not in CODE_TYPES:
            raise ValueError(f"`code_type` must be one of {CODE_TYPES}, got {self.code_type!r}.")
        if self.num_codebooks < 1:
            raise ValueError(f"`num_codebooks` must be at least 1, got {self.num_codebooks}.")
        if self.code_type == "sign" and self.codebook_size != 2:
            raise ValueError(
                "`codebook_size` must be 2 for sign codes (a codeword and its opposite), got "
                f"{self.codebook_size}; use `code_type='index'` for larger codebooks."
            )
        if self.code_type == "index" and not 1 <= self.codebook_size <= self.vocab_size:
            raise ValueError(
                f"`codebook_size` must lie between 1 and the vocabulary size {self.vocab_size}, "
                f"got {self.codebook_size}: more codewords than tokens cannot all be used."
            )
        if self.code_type == "index" and self.num_fine_tokens:
            raise ValueError(
                f"`num_fine_tokens` must be 0 for index codes, got {self.num_fine_tokens}: second "
                "codes go with sign codes."
            )
        if not 0 <= self.num_fine_tokens <= self.vocab_size:
            raise ValueError(
                f"`num_fine_tokens` must lie between 0 and the vocabulary size {self.vocab_size}, "
                f"got {self.num_fine_tokens}."
            )
        self._validate_nested()
        if self.output_loss not in OUTPUT_LOSSES:
            raise ValueError(
                f"`output_loss` must be one of {OUTPUT_LOSSES}, got {self.output_loss!r}."
            )
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"`logit_scale` must be positive and finite, got {self.logit_scale}.")
        cap = self.final_logit_softcapping
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(
                f"`final_logit_softcapping` must be positive and finite, or None, got {cap}."
            )
        self._validate_embeddings()
        self._validate_mixture()
        self._validate_refinement()

    def _validate_nested(self) -> None:
        nested = self.nested_codebooks
        if not nested:
            return
        if self.code_type != "sign":
            raise ValueError(
                f"`nested_codebooks` must be empty for index codes, got {nested}: smaller heads "
                "are the first bits of sign codes."
            )
        bounds = [0, *nested, self.num_codebooks]
        if any(one >= other for one, other in itertools.pairwise(bounds)):
            raise ValueError(
                "`nested_codebooks` must ascend, from at least 1 to less than `num_codebooks` "
                f"{self.num_codebooks}, got {nested}."
            )
        if self.embeddings == "tied":
            raise ValueError(
                f"`nested_codebooks` must be empty with `embeddings` 'tied', got {nested}: the "
                "table that both sides share is of one size."
            )

    def _validate_embeddings(self) -> None:
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(f"`embeddings` must be one of {EMBEDDINGS}, got {self.embeddings!r}.")
        if self.tie_word_embeddings != (self.embeddings == "tied"):
            raise ValueError(
                f"`tie_word_embeddings` must be False with `embeddings` {self.embeddings!r}: the "
                "head has no dense weight that the input embedding could share. Use "
                "`embeddings='tied'` for an input embedding that shares its codes."
            )
        if self.embeddings == "tied" and self.code_type != "sign":
            raise ValueError(
                "`embeddings` 'tied' needs a head of sign codes, got `code_type` "
                f"{self.code_type!r}; use 'vq', whose codes are its own, or 'keep'."
            )
        fine, most = self.embedding_fine_tokens, self.vocab_size if self.embeddings == "vq" else 0
        if not 0 <= fine <= most:
            raise ValueError(
                f"`embedding_fine_tokens` must lie between 0 and {most} with `embeddings` "
                f"{self.embeddings!r}, got {fine}."
            )
        terms = self.embedding_codebooks
        if self.embeddings != "vq" and terms is not None:
            raise ValueError(
                f"`embedding_codebooks` applies to `embeddings` 'vq' only, got {terms} with "
                f"{self.embeddings!r}."
            )
        if self.embeddings == "vq" and (terms is None or terms < 1):
            raise ValueError(
                "`embedding_codebooks` must be at least 1 with `embeddings` 'vq' (and is needed "
                f"beside a head of index codes), got {terms}."
            )

    def _validate_mixture(self) -> None:
        if self.num_mixtures < 1:
            raise ValueError(f"`num_mixtures` must be at least 1, got {self.num_mixtures}.")
        check_activation(self.gate_activation, "gate_activation")
        check_temperature(self.gate_temperature, "gate_temperature")
        if self.num_mixtures == 1:
            return
        plain = {"output_loss": "cross_entropy", "nested_codebooks": [], "refine_top_k": 0}
        for field, wanted in plain.items():
            if getattr(self, field) != wanted:
                raise ValueError(
                    f"`num_mixtures` {self.num_mixtures} goes with `{field}` {wanted!r} only, got "
                    f"{getattr(self, field)!r}: a mixture's logits are log-probabilities of one "
                    "size, whose errors are not known token by token."
                )

    def _validate_refinement(self) -> None:
        if not 0 <= self.refine_top_k <= self.vocab_size:
            raise ValueError(
                f"`refine_top_k` must lie between 0 and the vocabulary size {self.vocab_size}, got "
                f"{self.refine_top_k}."
            )
        z = self.refine_deviations
        if z is not None and not 0 <= z < math.inf:
            raise ValueError(
                "`refine_deviations` must be finite and not negative, or None for all candidates, "
                f"got {z}."
            )
        if self.refine_with_embedding and self.embeddings != "keep":
            raise ValueError(
                "`refine_with_embedding` needs the dense input embedding, but `embeddings` is "
                f"{self.embeddings!r}; use 'keep', or rows of its own."
            )
        if self.refine_top_k and self.nested_codebooks:
            raise ValueError(
                f"`refine_top_k` must be 0 beside `nested_codebooks` {self.nested_codebooks}, got "
                f"{self.refine_top_k}: the errors of the logits are known for one size only."
            )

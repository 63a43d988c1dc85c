import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GitConfig,
    LlavaConfig,
    MoshiConfig,
    Phi4MultimodalConfig,
    T5Config,
)

from hf_vqlogits.conversion import ConversionError, convert_to_vq
from hf_vqlogits.conversion.families import (
    LogitTransform,
    SourceParts,
    refuse_unsupported,
    take_apart,
)

# Hidden states that a family computes the same way twice may still differ in the last bits.
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def lossless(model):
    """Every token its own code: the quantised model must compute what the original does."""
    return convert_to_vq(
        model,
        method="kmeans",
        codebook_size=model.config.vocab_size,
        calibration_data="self",
        calibration_tokens=200,
    ).model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_conversion_generates_and_survives_saving(family, tied, tmp_path):
    original = tiny_model(family, tie_word_embeddings=tied)
    ids = torch.randint(3, original.config.vocab_size, (2, 9))
    with torch.no_grad():
        wanted = original(ids).logits.clone()
    if original.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(original.get_output_embeddings().bias)
        with torch.no_grad():
            wanted = original(ids).logits.clone()
    model = lossless(original)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, **TOLERANCE)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **options)
    torch.testing.assert_close(cached, model.generate(ids, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, **TOLERANCE)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_state_space_families_keep_cache_and_flags(family):
    original = tiny_model(family)
    model = lossless(original)
    ids = torch.randint(3, 90, (1, 5))
    cache, wanted = model(ids, use_cache=True).cache, original(ids, use_cache=True).cache
    assert cache.is_linear == wanted.is_linear
    assert all(cache.is_linear)
    assert model._is_stateful == original._is_stateful
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=model, max_new_tokens=2)


@pytest.mark.parametrize(
    ("family", "scales", "begins_again"),
    [
        ("phi3", {}, True),
        ("phimoe", {"short_mscale": 1.0, "long_mscale": 3.0}, True),
        ("llama", {}, False),
    ],
)
def test_text_outgrowing_the_short_rotation_goes_on_as_in_the_original(
    family, scales, begins_again
):
    rotation = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 8.0, 32.0, 128.0],
        **scales,
    }
    original = tiny_model(
        family, rope_parameters=rotation, original_max_position_embeddings=16, num_hidden_layers=3
    )
    ids = torch.randint(3, 96, (4, 9))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    wanted = original.generate(ids, **options)
    model, lengths = lossless(original), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    assert torch.equal(model.generate(ids, **options), wanted)
    assert lengths == [9, *[1] * 7, 17 if begins_again else 1, *[1] * 11]
    if begins_again:  # otherwise keys rotated both ways stay in the cache
        assert torch.equal(model.generate(ids, use_cache=False, **options), wanted)


@pytest.mark.parametrize(
    ("family", "changes", "transform"),
    [
        ("llama", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 5.0}, LogitTransform(1.0, 5.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitTransform()),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(0.125)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, LogitTransform(0.5)),
        ("recurrent_gemma", {"logits_soft_cap": 10.0}, LogitTransform(1.0, 10.0)),
    ],
)
def test_what_a_family_does_to_its_logits_is_found(family, changes, transform):
    assert take_apart(tiny_model(family, **changes)).transform == transform


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "changes", "transform"),
    [
        ("gpt2", {}, LogitTransform()),
        ("llama", {}, LogitTransform()),
        ("mixtral", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 0.5}, LogitTransform(1.0, 0.5)),
        ("granite", {"logits_scaling": 6.0}, LogitTransform(1 / 6)),
        ("cohere", {"logit_scale": 0.3}, LogitTransform(0.3)),
        ("falcon_h1", {"lm_head_multiplier": 0.7}, LogitTransform(0.7)),
        ("recurrent_gemma", {"logits_soft_cap": 3.0}, LogitTransform(1.0, 3.0)),
    ],
)
def test_it_is_found_in_half_precision_too(family, changes, transform, dtype):
    assert take_apart(tiny_model(family, **changes).to(dtype)).transform == transform


def test_an_unknown_transform_is_refused_with_the_difference():
    model = tiny_model("llama")
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden) ** 3
    with pytest.raises(ConversionError, match=r"llama.* still differ by .* not\s*supported"):
        take_apart(model)


def scaled(logits, factor):
    return logits * factor


def with_one_shifted(logits, by):
    logits[..., 7] += by * logits.abs().max()
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "amount"),
    [(scaled, 1.01), (scaled, 1.02), (scaled, 1.05), (scaled, 1.1), (with_one_shifted, 0.1)],
)
def test_a_transform_that_the_configuration_does_not_declare_is_refused(change, amount, dtype):
    model = tiny_model("llama").to(dtype)
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: change(inner(hidden), amount)
    with pytest.raises(ConversionError, match="not known here"):
        take_apart(model)


def test_logits_beyond_half_precision_are_refused_by_name():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert take_apart(model).transform == LogitTransform()
    with pytest.raises(ConversionError, match=r"float16 that are not finite.* float32 or bfloat16"):
        take_apart(model.to(torch.float16))


def test_logits_that_are_never_finite_are_refused():
    model = tiny_model("llama")
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden) / 0
    with pytest.raises(ConversionError, match=r"float32 that are not finite: its weights or its"):
        take_apart(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "'t5' is an encoder-decoder"),
        (LlavaConfig(), "'llava' is a multimodal"),
        (GitConfig(), "'git' is a multimodal"),
        (Phi4MultimodalConfig(), "'phi4_multimodal' is a multimodal"),
        (MoshiConfig(), "'moshi' is a multimodal"),
    ],
)
def test_other_kinds_are_refused_by_name(config, message):
    with pytest.raises(ConversionError, match=message):
        refuse_unsupported(config)


def test_a_model_without_output_embedding_is_refused():
    backbone = AutoModel.from_config(tiny_config("llama"))
    with pytest.raises(ConversionError, match="LlamaModel .* no output embedding"):
        take_apart(backbone)
    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(ConversionError, match="no output embedding"):
        take_apart(bert)


def test_a_converted_model_is_not_converted_again():
    model = lossless(tiny_model("gpt2"))
    with pytest.raises(ConversionError, match="already has a VQ-Logits head"):
        convert_to_vq(model, calibration_data="self")


def test_taking_apart_copies_nothing_and_restores_the_mode():
    model = tiny_model("gpt2").train()
    parts = take_apart(model)
    assert isinstance(parts, SourceParts)
    assert model.training
    assert parts.tied
    assert parts.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert parts.backbone is model.transformer


def test_an_output_layer_of_another_size_than_the_configuration_is_refused():
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 100, bias=False)
    with pytest.raises(ConversionError, match=r"is \(100, 32\), but its configuration says"):
        take_apart(model)

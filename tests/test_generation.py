import pytest
import torch
from tiny import VOCABULARY, perturb, text_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomForCausalLM,
    CompileConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)

FAMILIES = ["gpt2", "llama", "gemma2", "mamba"]
OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
}


def generate(model, ids, *, seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **(defaults | options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_as_without(make_model, ids, family, options):
    model = make_model(family)
    cached = generate(model, ids, use_cache=True, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (len(ids) * options.get("num_return_sequences", 1), 7 + 12)
    assert len(cached[:, 7:].unique()) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_used(make_model, ids, family):
    model = make_model(family)
    lengths = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    generate(model, ids, use_cache=True)
    assert lengths == [7] + [1] * 11


def test_greedy_takes_the_largest_logit(make_model, ids):
    model = make_model("llama")
    sequence = generate(model, ids)
    best = model(sequence).logits.argmax(-1)
    assert torch.equal(best[:, 6:-1], sequence[:, 7:])


def test_a_smaller_head_generates_by_its_own_logits(make_model, ids):
    model = make_model("llama", nested_codebooks=[8], num_fine_tokens=7)
    whole = generate(model, ids)
    model.keep_codebooks(8)
    sequence = generate(model, ids)
    assert not torch.equal(sequence, whole)
    best = model(sequence).logits.argmax(-1)
    assert torch.equal(best[:, 6:-1], sequence[:, 7:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_left_padding_changes_nothing(make_model, ids, family):
    model = make_model(family)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 4).long().expand(2, -1)
    given = model.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(given[:, 11:], generate(model, ids, max_new_tokens=8)[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_input_embeddings_may_be_given(make_model, ids, family):
    model = make_model(family)
    embedded = model.get_input_embeddings()(ids)
    given = model.generate(
        inputs_embeds=embedded, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(given, generate(model, ids, max_new_tokens=8)[:, 7:])


def dense_model():
    model = AutoModelForCausalLM.from_config(text_config("gpt2")).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("roles", ["quantised, dense", "dense, quantised", "both quantised"])
def test_assisted_gives_the_same_tokens(make_model, ids, roles):
    target, assistant = make_model("llama"), make_model("gpt2")
    if roles == "quantised, dense":
        assistant = dense_model()
    elif roles == "dense, quantised":
        target = dense_model()
    prompt = ids[:1]
    alone = generate(target, prompt)
    assert torch.equal(generate(target, prompt, assistant_model=assistant), alone)
    same = generate(target, prompt, assistant_model=target)
    assert torch.equal(same, alone)
    sampled = generate(target, prompt, assistant_model=assistant, do_sample=True)
    assert sampled.shape == alone.shape


def test_prompt_lookup_gives_the_same_tokens(make_model, ids):
    model, prompt = make_model("llama"), ids[:1].repeat(1, 2)
    looked_up = generate(model, prompt, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, generate(model, prompt))


@pytest.mark.parametrize(
    ("prompt", "begins_again"), [(7, True), (20, False)], ids=["short prompt", "long prompt"]
)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_text_that_outgrows_the_short_rotation_goes_in_once_more(
    make_model, prompt, begins_again, implementation
):
    rotation = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 8.0, 32.0, 128.0],
    }
    fields = {"rope_parameters": rotation, "original_max_position_embeddings": 16}
    model, lengths = make_model("phi3", text_config=text_config("phi3", **fields)), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    ids = torch.randint(3, VOCABULARY, (2, prompt), generator=torch.Generator().manual_seed(7))
    found = generate(model, ids, cache_implementation=implementation, return_dict_in_generate=True)
    assert lengths == [prompt, *[1] * 9, 17 if begins_again else 1, 1]
    assert torch.equal(found.sequences, generate(model, ids, use_cache=False))
    kept = implementation == "static" and not begins_again
    assert isinstance(found.cache, StaticCache) == kept


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_older_names_of_the_cache(make_model, ids, family, name):
    model = make_model(family)
    cache = model(ids, use_cache=True).cache
    whole = torch.cat([ids, ids[:, :1]], 1)
    options = {"next_sequence_length": 1, "attention_mask": torch.ones_like(whole)}
    wanted = model.prepare_inputs_for_generation(whole, cache=cache, **options)
    with pytest.warns(FutureWarning, match=f"`{name}` is deprecated .* Use `cache` instead"):
        inputs = model.prepare_inputs_for_generation(whole, **{name: cache}, **options)
    assert inputs["cache"] is cache
    assert torch.equal(inputs["input_ids"], ids[:, :1])
    assert (inputs["attention_mask"] is None) == (family == "mamba")
    assert inputs.keys() == wanted.keys()


# State-space backbones


def test_the_state_of_a_state_space_backbone_is_returned(make_model, ids):
    model = make_model("mamba")
    outputs = model(ids, use_cache=True)
    assert all(outputs.cache.is_linear)
    # The prompt's state continues as if the whole text had been given.
    following = torch.tensor([[5], [9]])
    step = model(following, cache=outputs.cache, use_cache=True).logits
    whole = model(torch.cat([ids, following], 1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=2e-2, rtol=1e-2)
    assert generate(model, ids, return_dict_in_generate=True).cache is not None


def test_a_given_state_is_continued(make_model, ids):
    model = make_model("mamba")
    state = model(ids[:, :-1], use_cache=True).cache
    continued = generate(model, ids[:, -1:], cache=state, max_new_tokens=8)
    assert torch.equal(continued[:, 1:], generate(model, ids, max_new_tokens=8)[:, 7:])


def test_masks_go_to_state_space_backbones_with_the_prompt_only(make_model, ids):
    model, masks = make_model("mamba"), []
    model.model.backbone.register_forward_pre_hook(
        lambda _, __, kwargs: masks.append(kwargs.get("attention_mask") is not None),
        with_kwargs=True,
    )
    mask = torch.ones_like(ids)  # `generate` itself drops masks that are 1 everywhere
    mask[0, :2] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert masks == [True, False, False]


def test_state_space_backbones_refuse_assistance(make_model, ids):
    model = make_model("mamba")
    assert model._is_stateful
    assert not make_model("llama")._is_stateful
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generate(model, ids[:1], assistant_model=make_model("gpt2"))


# Static caches


OWN_MASKS = pytest.mark.skipif(
    not hasattr(BloomForCausalLM, "create_masks_for_generate"),
    reason="this version of Transformers prepares BLOOM's static cache in the class of the model",
)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", pytest.param("bloom", marks=OWN_MASKS)]
)
def test_static_cache_as_dynamic_cache(make_model, ids, family):
    model = make_model(family)
    static = generate(model, ids, cache_implementation="static")
    assert torch.equal(static, generate(model, ids))


def test_static_cache_compiled(make_model, ids):
    model = make_model("llama", text_config=text_config("llama", num_hidden_layers=1))
    options = CompileConfig(backend="aot_eager", fullgraph=True)
    options._compile_all_devices = True  # otherwise `generate` compiles on accelerators only
    static = generate(model, ids, cache_implementation="static", compile_config=options)
    assert torch.equal(static, generate(model, ids))


# Pipelines


@pytest.fixture
def folder(make_model, tmp_path):
    """A saved model with a tokenizer of words and a chat template."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    words[3:5] = ["user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    model = make_model("llama")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    return tmp_path


def test_pipeline(folder, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = pipeline("text-generation", model=str(folder))
    assert type(generator.model) is type(model)
    assert "not supported" not in caplog.text
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    text = generator("w10 w11 w12", return_full_text=False, **options)[0]["generated_text"]
    prompt = tokenizer("w10 w11 w12", return_tensors="pt")
    wanted = model.generate(**prompt, **options)[0, 3:]
    assert text.split() == tokenizer.convert_ids_to_tokens(wanted.tolist())


def test_chat(folder):
    generator = pipeline("text-generation", model=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "w20 w21"}]
    answer = generator(chat, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert answer[:1] == chat
    assert answer[1]["role"] == "assistant"
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert prompt["input_ids"].tolist() == [[1, 3, 20, 21, 1, 4]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, 6:]
    words = tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer[1]["content"].split() == words.split()


def test_generation_options_are_saved_with_the_model(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.generation_config.pad_token_id == 0


def test_hooks_on_the_head_fire_in_generate(make_model, ids):
    model = make_model("llama")
    calls = []
    assert isinstance(model.lm_head, nn.Module)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    generate(model, ids)
    assert len(calls) == 12

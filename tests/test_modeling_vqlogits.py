import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from tiny import VOCABULARY, perturb, reference_logits, text_config
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsModel

FAMILIES = ["gpt2", "llama", "gemma2"]
HEADS = {
    "sign": {"num_codebooks": 19},
    "second codes": {"num_codebooks": 19, "num_fine_tokens": 8},
    "nested": {"num_codebooks": 19, "num_fine_tokens": 8, "nested_codebooks": [4, 8]},
    "index": {"code_type": "index", "num_codebooks": 3, "codebook_size": 7},
    "one codebook": {"code_type": "index", "num_codebooks": 1, "codebook_size": 20},
}
HEAD_TENSORS = {"codebook", "codebook_bias", "codes", "hidden_mean", "fold_direction"}


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_backbone_and_codes(make_model, ids, family, head):
    model = make_model(family, **head)
    outputs = model(ids)
    hidden = model.model(ids).last_hidden_state
    assert outputs.loss is None
    torch.testing.assert_close(
        outputs.logits.double(), reference_logits(model.lm_head, hidden), atol=2e-2, rtol=1e-2
    )


# Saving and loading


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "gpt_neox", "mamba"])
def test_saved_and_loaded(make_model, ids, tmp_path, family, head):
    model = make_model(family, **head)
    model.save_pretrained(tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    saved = saved_tensors(tmp_path)
    fine = {"fine_codes", "fine_ids"} if model.lm_head.num_fine_tokens else set()
    sizes = model.lm_head.nested_codebooks
    nested = {f"{n}_{bits}" for n in ("codebook", "codebook_bias") for bits in sizes}
    names = {f"lm_head.{n}" for n in HEAD_TENSORS | fine | nested}
    assert {n for n in saved if n.startswith("lm_head.")} == names
    assert all(n.startswith(("lm_head.", "model.backbone.")) for n in saved)
    assert torch.equal(saved["lm_head.codes"], model.lm_head.codes)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "VQLogitsForCausalLM"
    ]

    torch.manual_seed(99)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is VQLogitsForCausalLM
    assert not any(info.values())
    assert loaded.config.text_config is loaded.model.backbone.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_names_of_the_tensors_are_stable(make_model):
    names = {n for n in make_model("llama").state_dict() if "layers" not in n}
    assert names == {
        "model.backbone.embed_tokens.weight",
        "model.backbone.norm.weight",
        *(f"lm_head.{name}" for name in HEAD_TENSORS),
    }


def test_sharded_checkpoint(make_model, ids, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert "lm_head.codes" in index["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
def test_dtype_of_loading_leaves_codes_integer(make_model, ids, tmp_path, dtype):
    model = make_model("llama", num_codebooks=300)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert loaded.lm_head.codebook.dtype == loaded.dtype == wanted
    assert loaded.lm_head.codes.dtype == torch.uint8
    assert torch.equal(loaded.lm_head.codes, model.lm_head.codes)
    torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_map(make_model, ids, tmp_path, device_map):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_head_offloaded_to_disk(make_model, ids, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offloaded",
        offload_buffers=True,
    )
    assert loaded.lm_head.codebook.is_meta
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loss = loaded(ids, labels=ids, skip_logits=True).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


def test_base_model_loads_from_the_same_folder(make_model, ids, tmp_path, caplog):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is VQLogitsModel
    assert not any(info.values())
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    torch.testing.assert_close(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)


# Positions, outputs and copies


@pytest.mark.parametrize("keep", [0, 1, 3, 99])
def test_logits_of_the_last_positions(make_model, ids, keep):
    model = make_model("llama")
    logits = model(ids).logits
    kept = model(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, logits[:, -keep:] if keep else logits, atol=2e-2, rtol=1e-2)


def test_logits_of_chosen_positions(make_model, ids):
    model = make_model("llama")
    logits = model(ids).logits

    def kept(positions):
        return model(ids, logits_to_keep=positions).logits

    def same(one, other):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)

    same(kept(torch.tensor([0, 5])), logits[:, [0, 5]])
    each = torch.tensor([[0, 5], [2, 3]])
    same(kept(each), torch.stack([logits[0, each[0]], logits[1, each[1]]]))
    mask = ids % 2 == 0
    same(kept(mask), logits[mask])


def test_tuples_instead_of_outputs(make_model, ids):
    model = make_model("llama")
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    outputs = model(ids, labels=ids)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    assert cache.get_seq_length() == ids.shape[1]
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], logits)
    model.config.text_config.return_dict = False
    assert torch.equal(model(ids, return_dict=True).logits, logits)


def test_outputs_of_the_backbone_are_passed_on(make_model, ids):
    model = make_model("llama", attn_implementation="eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == 2
    torch.testing.assert_close(
        model.lm_head(outputs.hidden_states[-1]), outputs.logits, atol=2e-2, rtol=1e-2
    )


def test_outputs_asked_for_in_the_configuration(make_model, ids):
    model = make_model("llama", output_hidden_states=True)
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_switching_the_cache_off_reaches_the_backbone(make_model, ids):
    model = make_model("gpt2")
    assert model(ids).cache is not None
    model.config.use_cache = False
    assert model(ids).cache is None
    assert model(ids, use_cache=True).cache is not None


def test_input_embeddings_may_be_given(make_model, ids):
    model = make_model("llama")
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_padding_on_the_left_changes_nothing(make_model, ids):
    model = make_model("llama")
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids).logits, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_copies_are_independent(make_model, ids, family, copied):
    model = make_model(family)
    twin = copied(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.config.text_config is twin.model.backbone.config is not model.config.text_config
    perturb(twin, seed=5)
    assert not torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model(make_model, ids, dtype):
    model = make_model("llama")
    wanted, codes = model(ids).logits, model.lm_head.codes.clone()
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert torch.equal(model.lm_head.codes, codes)
    torch.testing.assert_close(model(ids).logits.float(), wanted, atol=0.3, rtol=0.1)


# Parts


def test_embeddings_and_sizes(make_model):
    model = make_model("gpt2")
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.backbone.wte
    embedding = nn.Embedding(VOCABULARY, 32)
    model.set_input_embeddings(embedding)
    assert model.model.backbone.wte is embedding
    head = make_model("gpt2").lm_head
    model.set_output_embeddings(head)
    assert model.lm_head is head
    with pytest.raises(TypeError, match="must be a `VQLogitsHead`, got Linear; `model.to_dense"):
        model.set_output_embeddings(nn.Linear(32, VOCABULARY))

    head_parameters = 19 * 33
    body = sum(p.numel() for p in model.model.parameters())
    assert model.num_parameters() == body + head_parameters
    without = model.num_parameters(exclude_embeddings=True)
    assert without == model.num_parameters() - 61 * 32 - 128 * 32


def test_registered_with_the_auto_classes():
    assert MODEL_FOR_CAUSAL_LM_MAPPING[VQLogitsConfig] is VQLogitsForCausalLM
    # Listing the table imports every class in it; ours stands in no module of Transformers.
    assert VQLogitsForCausalLM in list(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.values())
    assert VQLogitsConfig in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())


def test_sharding_plan_names_existing_modules(make_model):
    names = {name for name, _ in make_model("llama").named_modules()}
    patterns = {p.replace("*", "0") for p in make_model("llama").fsdp_plan}
    assert "lm_head" in patterns
    assert patterns <= names


# Loss


def labels_for(ids):
    labels = ids.clone()
    labels[0, 2:4] = -100
    return labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_loss_shifts_labels(make_model, ids, family, head):
    model, labels = make_model(family, **head), labels_for(ids)
    logits = reference_logits(model.lm_head, model.model(ids).last_hidden_state)
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def loss(**arguments):
        return model(ids, **arguments).loss.double()

    def same(one, other):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)

    mean, total = (cross_entropy(rows, targets, reduction=r) for r in ("mean", "sum"))
    same(loss(labels=labels), mean)
    same(loss(labels=labels, skip_logits=True), mean)
    same(loss(labels=labels, logits_to_keep=1), mean)
    same(loss(labels=labels, num_items_in_batch=50), total / 50)
    same(loss(labels=labels, num_items_in_batch=torch.tensor(50)), total / 50)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    same(loss(shift_labels=shifted), mean)
    same(loss(shift_labels=shifted, labels=torch.zeros_like(labels)), mean)
    same(loss(shift_labels=shifted.flatten(), num_items_in_batch=7), total / 7)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_the_loss_may_be_a_margin(make_model, ids, head, tmp_path):
    model, labels = make_model("llama", output_loss="squared_hinge", **head), labels_for(ids)
    logits = reference_logits(model.lm_head, model.model(ids).last_hidden_state)
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    signs = torch.where(targets[:, None] == torch.arange(VOCABULARY), 1.0, -1.0)
    losses = torch.clamp(1 - signs * rows, min=0).square().sum(1)[targets != -100]
    torch.testing.assert_close(
        model(ids, labels=labels).loss.double(), losses.mean(), atol=1e-2, rtol=1e-2
    )
    found = model(ids, labels=labels, num_items_in_batch=50, skip_logits=True).loss.double()
    torch.testing.assert_close(found, losses.sum() / 50, atol=1e-2, rtol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.output_loss == "squared_hinge"
    assert torch.equal(loaded(ids, labels=labels).loss, model(ids, labels=labels).loss)


@pytest.mark.parametrize(
    "head", [HEADS["sign"], HEADS["nested"], HEADS["index"], HEADS["one codebook"]]
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_model_of_margins_starts_near_its_optimum_and_learns(ids, head, scale):
    torch.manual_seed(0)
    fields = {"output_loss": "squared_hinge", "logit_scale": scale, **head}
    fields["num_fine_tokens"] = 0
    config = VQLogitsConfig(text_config=text_config("llama"), **fields)
    model = VQLogitsForCausalLM(config)
    # All tokens at -1: the label alone is wrong, by (1 + 1)^2.
    before = float(model(ids, labels=ids).loss)
    assert before == pytest.approx(4, abs=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(model(ids, labels=ids).loss) < before - 0.5
    if model.lm_head.nested_codebooks:
        model.keep_codebooks(4)
        model.lm_head.codebook.data[1:] = 0
        assert float(model.lm_head(torch.zeros(1, 32)).mean()) == pytest.approx(-1, abs=0.1)


def test_logits_are_skipped_in_training_with_labels_only(make_model, ids):
    model = make_model("llama")
    assert model(ids, labels=ids).logits is not None
    assert model(ids, labels=ids, skip_logits=True).logits is None
    assert model(ids, shift_labels=ids, skip_logits=True).logits is None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, shift_labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model(ids).logits is not None
    with pytest.raises(ValueError, match="`skip_logits=True` needs `labels` or `shift_labels`"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_gradients_reach_every_parameter(make_model, ids, head):
    model = make_model("llama", **head).train()
    model(ids, labels=ids).loss.backward()
    skipped = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in skipped.values())
    assert {"lm_head.codebook", "lm_head.codebook_bias"} < skipped.keys()

    model.zero_grad()
    logits = model(ids).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, skipped[name], atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(make_model, ids, family, reentrant):
    model = make_model(family).train()
    model.config.use_cache = False
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.model.backbone.gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_autocast(make_model, ids, dtype, head):
    model = make_model("llama", **head).train()
    wanted = model(ids, labels=ids, skip_logits=False)
    wanted.loss.backward()
    gradient = model.lm_head.codebook.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        outputs = model(ids, labels=ids, skip_logits=False)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.logits.dtype == dtype
    assert model.lm_head.codebook.grad.dtype == torch.float32
    torch.testing.assert_close(outputs.logits.float(), wanted.logits, atol=0.3, rtol=0.1)
    torch.testing.assert_close(outputs.loss, wanted.loss, atol=0.05, rtol=0.02)
    torch.testing.assert_close(model.lm_head.codebook.grad, gradient, atol=0.02, rtol=0.2)


def test_everything_goes_through_the_forward_of_the_head(make_model, ids):
    model = make_model("llama")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    model(ids)
    assert len(calls) == 1
    model(ids, labels=ids, skip_logits=True)
    assert len(calls) == 2


# Compilers


def test_compiled_without_breaks(make_model, ids):
    model = make_model("llama", text_config=text_config("llama", num_hidden_layers=1))
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=2e-2, rtol=1e-2)
    model.train()
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    gradient = model.lm_head.codebook.grad.clone()
    model.zero_grad()
    wanted = model(ids, labels=ids).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, model.lm_head.codebook.grad, atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["sign", "index"])
def test_compiled_by_inductor(make_model, ids, head):
    """As `torch.compile` does unless told otherwise."""
    layers = text_config("llama", num_hidden_layers=1)
    model = make_model("llama", text_config=layers, **HEADS[head])
    model.config.use_cache = False
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, labels=ids)
        wanted = model(ids, labels=ids)
    torch.testing.assert_close(compiled.logits, wanted.logits, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(compiled.loss, wanted.loss, atol=1e-3, rtol=1e-3)


def test_exported(make_model, ids):
    model = make_model("llama")
    model.config.use_cache = False
    program = torch.export.export(model, (ids,), strict=False)
    torch.testing.assert_close(
        program.module()(ids).logits, model(ids).logits, atol=2e-2, rtol=1e-2
    )

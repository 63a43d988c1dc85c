"""Codes learnt in a plain loop, by one process and by two."""

import copy

import pytest
import torch
from processes import PROCESSES, results_of
from tiny import VOCABULARY, reference_logits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, ops
from hf_vqlogits.conversion import code_training
from hf_vqlogits.conversion.code_learning import FLIPS, Slope
from hf_vqlogits.conversion.code_training import (
    JUDGED,
    KEPT_OUT,
    CodeLearner,
    trainable_head,
    whole,
)
from hf_vqlogits.conversion.errors import ConversionError

ROWS, LENGTH = 48, 24


@pytest.fixture
def batch():
    """Rows of tokens in which each nearly always follows from the one before."""
    return pattern(VOCABULARY)


def pattern(vocabulary):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator)
    for place in range(1, LENGTH):
        follows = 3 + (5 * ids[:, place - 1]) % 20
        sure = torch.rand(ROWS, generator=generator) < 0.8
        ids[:, place] = torch.where(sure, follows, ids[:, place])
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture
def make(make_model):
    """Builder of models that know next to nothing, so that their codes have much to learn."""

    def build(**fields):
        model = make_model("gpt2", **({"num_codebooks": 40} | fields)).train()
        model.lm_head.codebook.data /= 8
        return model

    return build


@pytest.fixture
def model(make):
    return make(num_fine_tokens=9)


def loss_of(model, batch):
    return model(**batch, skip_logits=True).loss


def codes_of(model):
    head = trainable_head(model)
    return {"codes": head.codes.clone(), "fine_codes": head.fine_codes.clone()}


def counted(labels, step=0):
    """Positions that a move is made from, and those that it is judged by."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    kept_out = torch.arange(shifted.shape[1]) % KEPT_OUT == step % KEPT_OUT
    counts = shifted != -100
    return int((counts & ~kept_out).sum()), int((counts & kept_out).sum())


def test_a_move_lowers_the_loss(model, batch):
    before, codes = float(loss_of(model, batch).detach()), codes_of(model)
    model.eval()
    wrong = model(batch["input_ids"]).logits  # kernels keep layouts of these codes
    model.train()
    learner = CodeLearner(model, every=1)
    loss_of(model, batch)
    move = learner.step()
    assert move.taken
    assert move.positions == counted(batch["labels"])[0]
    assert learner.history == [move]
    after = float(loss_of(model, batch).detach())
    assert after < 0.95 * before

    changed = 0
    for name, now in codes_of(model).items():
        flips = (ops.unpack_signs(now, 40) != ops.unpack_signs(codes[name], 40)).sum(1)
        assert int(flips.max()) <= FLIPS
        changed += int(flips.sum())
    assert changed == move.flips > 0
    model.lm_head.check_codes()
    model.eval()
    hidden = model.model(batch["input_ids"]).last_hidden_state
    logits = model(batch["input_ids"]).logits
    torch.testing.assert_close(
        logits.double(), reference_logits(model.lm_head, hidden), atol=2e-2, rtol=1e-2
    )
    assert float((logits - wrong).abs().max()) > 0.1


def test_smaller_heads_inside_stay_as_they_are(make, batch):
    model = make(num_fine_tokens=9, nested_codebooks=[11, 20])
    small, codes = copy.deepcopy(model), codes_of(model)
    small.keep_codebooks(20)
    learner = CodeLearner(model, every=1)
    loss_of(model, batch)
    assert learner.step().taken
    for name, now in codes_of(model).items():
        one, other = (ops.unpack_signs(t, 40) for t in (codes[name], now))
        assert torch.equal(one[:, :20], other[:, :20])
        assert not torch.equal(one[:, 20:], other[:, 20:])
    model.keep_codebooks(20)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())


def test_losses_of_a_move_are_those_of_the_positions_kept_out(model, batch):
    batch["labels"][::3, :9] = -100
    learner = CodeLearner(model, every=1)
    head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        hidden = model.model(batch["input_ids"]).last_hidden_state
    loss_of(model, batch)
    move = learner.step()
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1::][:, ::KEPT_OUT]
    for loss, layer in ((move.loss_before, head), (move.loss_after, model.lm_head)):
        logits = reference_logits(layer, hidden[:, ::KEPT_OUT]).flatten(0, 1)
        wanted = nn.functional.cross_entropy(logits, labels.flatten())
        assert loss == pytest.approx(float(wanted), rel=1e-3)


def test_state_of_the_optimiser_is_left_alone_and_training_goes_on(model, batch):
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    learner = CodeLearner(model, every=4)
    parameters = list(model.parameters())
    losses = []
    for step in range(1, 13):
        loss = loss_of(model, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        state, codes = copy.deepcopy(optimiser.state_dict()), codes_of(model)
        move = learner.step()
        assert (move is not None) == (step % 4 == 0)
        if move is None:
            assert torch.equal(codes_of(model)["codes"], codes["codes"])
        torch.testing.assert_close(optimiser.state_dict(), state, atol=0, rtol=0)
        losses.append(float(loss.detach()))
    assert [move.step for move in learner.history] == [4, 8, 12]
    assert any(move.taken for move in learner.history)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert losses[-1] < 0.8 * losses[0]


def test_codes_help_beside_the_optimiser(make, batch):
    def trained(learn):
        model = make()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        learner = CodeLearner(model, every=3) if learn else None
        for _ in range(9):
            loss_of(model, batch).backward()
            optimiser.step()
            optimiser.zero_grad()
            if learner is not None:
                learner.step()
        return float(loss_of(model, batch).detach())

    assert trained(True) < 0.9 * trained(False)


def parts(batch, count):
    chunks = zip(*(tensor.chunk(count) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, chunk, strict=True)) for chunk in chunks]


def test_accumulated_gradients_count_every_position_once(make, batch):
    batch["labels"][::3, :9] = -100
    moves, codes = [], []
    for count in (1, 4):
        model = make(num_fine_tokens=9)
        learner = CodeLearner(model, every=1)
        for part in parts(batch, count):
            loss_of(model, part).backward()
        moves.append(learner.step())
        codes.append(codes_of(model))
    assert moves[0].positions == moves[1].positions == counted(batch["labels"])[0]
    assert moves[0].flips == moves[1].flips
    assert moves[0].loss_after == pytest.approx(moves[1].loss_after, rel=1e-5)
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_count_once(model, batch, reentrant):
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    learner = CodeLearner(model, every=1)
    loss_of(model, batch).backward()
    assert learner.step().positions == counted(batch["labels"])[0]


# A reentrant checkpoint needs an input that requires gradients.
@pytest.mark.parametrize(("reentrant", "frozen"), [(True, False), (False, False), (False, True)])
def test_a_checkpointed_head_counts_once(model, batch, reentrant, frozen):
    hidden = model.model(batch["input_ids"]).last_hidden_state
    hidden = hidden.detach() if frozen else hidden
    learner = CodeLearner(model.lm_head, every=1)
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    checkpoint(model.lm_head, hidden, labels, use_reentrant=reentrant).backward()
    assert learner.step().positions == counted(batch["labels"])[0]


@pytest.mark.parametrize("way", ["autocast", "compiled", "bfloat16"])
def test_other_ways_to_run(model, batch, way):
    if way == "bfloat16":
        model.bfloat16()
    learner = CodeLearner(model, every=1)
    if way == "compiled":
        model.lm_head.compile(backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss_of(model, batch).backward()
    move = learner.step()
    assert move.taken
    assert move.positions == counted(batch["labels"])[0]


def test_only_training_with_labels_counts(model, batch):
    learner = CodeLearner(model, every=1)
    loss_of(model, batch)
    model(batch["input_ids"])
    with torch.no_grad():
        loss_of(model, batch)
    model.eval()
    loss_of(model, batch)
    assert learner.step().positions == counted(batch["labels"])[0]


def test_positions_kept_out_take_turns_and_the_latest_are_kept(model, batch, monkeypatch):
    learner = CodeLearner(model, every=3)
    for _ in range(3):
        loss_of(model, batch)
        move = learner.step()
    assert move.positions == sum(counted(batch["labels"], step)[0] for step in range(3))
    monkeypatch.setattr(code_training, "JUDGED", 150)
    for step in range(3, 6):
        loss_of(model, batch)
        kept = [len(labels) for _, labels, _ in learner._kept]
        latest = [counted(batch["labels"], s)[1] for s in range(step - 2)]
        assert kept == latest[-2:]
        learner.step()
    assert JUDGED > 1000


def test_hidden_states_that_overflowed_do_not_count(model, batch):
    learner = CodeLearner(model, every=1)
    hidden = model.model(batch["input_ids"]).last_hidden_state.detach()
    hidden[0] = torch.inf
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    model.lm_head(hidden, labels)
    move = learner.step()
    assert move.positions == counted(batch["labels"][1:])[0]
    assert move.taken


def test_codes_that_raise_the_loss_are_not_taken(model, batch, monkeypatch):
    original = code_training.move_codes

    def worsen(head, metric, slope, *options):
        original(head, metric, Slope(-30 * slope.gradient, slope.curvature), *options)

    monkeypatch.setattr(code_training, "move_codes", worsen)
    learner, codes = CodeLearner(model, every=1), codes_of(model)
    first = learner.damping
    for tried in range(1, 6):
        loss_of(model, batch)
        move = learner.step()
        assert move.loss_after > move.loss_before
        assert not move.taken
        assert move.damping == first * 2 ** (tried - 1)
    assert all(torch.equal(codes[name], now) for name, now in codes_of(model).items())
    # No move however small helps: it stops, and costs nothing any more.
    assert not model.lm_head._forward_pre_hooks
    loss_of(model, batch)
    assert learner.step() is None


def test_a_move_of_nothing_does_not_raise_the_damping(model, batch, monkeypatch):
    monkeypatch.setattr(code_training, "move_codes", lambda *arguments: None)
    learner = CodeLearner(model, every=1, damping=3.0)
    loss_of(model, batch)
    move = learner.step()
    assert move.flips == 0
    assert not move.taken
    assert learner.damping == 3.0


def test_a_window_without_a_label_or_with_a_broken_loss_moves_nothing(model, batch, caplog):
    learner, codes = CodeLearner(model, every=1), codes_of(model)
    loss_of(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert learner.step() is None
    assert "no label counted" in caplog.text
    with torch.no_grad():
        model.lm_head.codebook[0, 0] = torch.nan
    loss_of(model, batch)
    assert learner.step() is None
    assert "a loss was not finite" in caplog.text
    assert all(torch.equal(codes[name], now) for name, now in codes_of(model).items())


def test_the_heads_own_messages_come_through(model, batch):
    CodeLearner(model, every=1)
    hidden = torch.zeros(2, 3, model.lm_head.in_features)
    with pytest.raises(ValueError, match="must have the shape of the positions"):
        model.lm_head(hidden, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(IndexError, match=f"`labels` holds {VOCABULARY}"):
        model.lm_head(hidden, torch.full((2, 3), VOCABULARY))


def test_close_leaves_nothing_behind(model, batch):
    learner = CodeLearner(model)
    assert len(model.lm_head._forward_pre_hooks) == 1
    learner.close()
    learner.close()
    assert not model.lm_head._forward_pre_hooks
    assert learner.step() is None


def test_labels_must_pass_through_the_head(model, batch):
    learner = CodeLearner(model, every=2)
    model(batch["input_ids"])
    assert learner.step() is None
    with pytest.raises(ConversionError, match="In 2 steps the head was never asked for a loss"):
        learner.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` is 0; it must be at least one"),
        ({"damping": 0.0}, "`damping` is 0.0; it must be positive"),
        ({"damping": 64.0}, "`damping` is 64.0; it must be positive and at most 32, where moves"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        CodeLearner(model, **options)


def test_a_margin_has_no_codes_to_learn(make_model):
    model = make_model("llama", output_loss="squared_hinge").train()
    learner = CodeLearner(model)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConversionError, match="but `output_loss` is 'squared_hinge'"):
        model(ids, labels=ids)
    learner.close()
    assert model(ids, labels=ids).loss > 0


def test_heads_that_cannot_learn_are_refused(make_model):
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(ConversionError, match="GPT2LMHeadModel has no `VQLogitsHead`"):
        CodeLearner(dense)
    index = make_model(code_type="index", num_codebooks=3, codebook_size=5)
    with pytest.raises(ConversionError, match="sign codes only, and .* `code_type` is 'index'"):
        CodeLearner(index)
    with pytest.raises(ConversionError, match=r"input embedding's too \(`embeddings` 'tied'\)"):
        CodeLearner(make_model(embeddings="tied"))
    frozen = make_model()
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(ConversionError, match="but 0 of the 1 of VQLogitsForCausalLM"):
        CodeLearner(frozen)
    spread = make_model()
    spread.lm_head.codebook = nn.Parameter(torch.empty(0))  # as DeepSpeed leaves it
    with pytest.raises(ConversionError, match=r"shape \(0,\) .* not \(19, 32\): it is spread by"):
        CodeLearner(spread)


def test_quantised_input_embeddings_of_their_own_stay(make, batch):
    model = make(embeddings="vq")
    codes = model.get_input_embeddings().codes.clone()
    learner = CodeLearner(model, every=1)
    loss_of(model, batch)
    assert learner.step().taken
    assert torch.equal(model.get_input_embeddings().codes, codes)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_an_adapter_keeps_the_codes_that_it_learnt(make, batch, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_vqlogits.integrations.peft import lora_config

    base = make()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora_config(base, r=2)).train()
    head = trainable_head(model)
    codes = head.codes.clone()
    learner = CodeLearner(model, every=1)
    loss_of(model, batch)
    assert learner.step().taken
    assert not torch.equal(head.codes, codes)
    model.save_pretrained(tmp_path / "adapter")
    fresh = VQLogitsForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    active = loaded.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(active.codes, head.codes)


def test_a_whole_copy_is_the_head_in_float32(model):
    model.bfloat16()
    head = model.lm_head
    same = whole(head)
    assert same.codebook.dtype == torch.float32
    hidden = torch.randn(5, head.in_features)
    torch.testing.assert_close(
        same(hidden).double(), reference_logits(head, hidden), atol=2e-2, rtol=1e-2
    )
    same.codes.zero_()
    assert int(head.codes.sum()) > 0
    assert head.codebook.requires_grad


STEPS = 6
WIDTHS = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}


def build():
    """A model that is the same in every process."""
    torch.manual_seed(0)
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **WIDTHS, **dropouts)
    model = VQLogitsForCausalLM(
        VQLogitsConfig(text_config=config, num_codebooks=40, num_fine_tokens=9)
    )
    model.lm_head.codebook.data *= 20
    return model.train()


def learn(model, rank, processes):
    """Train with moves of the codes on this process's share of the rows."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    learner = CodeLearner(model, every=2)
    share = parts(pattern(VOCABULARY), processes)[rank]
    for _ in range(STEPS):
        loss_of(model, share).backward()
        optimiser.step()
        optimiser.zero_grad()
        learner.step()
    return {"moves": [tuple(move) for move in learner.history], **codes_of(model)}


def ddp(rank):
    return learn(DistributedDataParallel(build()), rank, PROCESSES)


def fsdp(rank):
    model = build()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return learn(model, rank, PROCESSES)


def fsdp_in_one_unit(rank):
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return learn(model, rank, PROCESSES)


def disagreeing(rank):
    """Processes that search otherwise, as another processor might: rank 0 decides."""
    model, original = DistributedDataParallel(build()), code_training.move_codes

    def move(head, *arguments):
        if rank:
            head.codes.zero_()
        else:
            original(head, *arguments)

    code_training.move_codes = move
    try:
        return learn(model, rank, PROCESSES)
    finally:
        code_training.move_codes = original


WAYS = {way.__name__: way for way in (ddp, fsdp, fsdp_in_one_unit, disagreeing)}


def work(rank):
    return {name: way(rank) for name, way in WAYS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(work, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_the_codes_that_one_does(results, way):
    single, start = learn(build(), 0, 1), codes_of(build())
    first, second = (result[way] for result in results)
    assert first["moves"] == second["moves"]
    assert [move[0] for move in first["moves"]] == [2, 4, 6]
    assert any(move[4] < move[3] for move in first["moves"])
    for name, codes in start.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], single[name])
        assert not torch.equal(first[name], codes)
    assert [m[:3] for m in first["moves"]] == [m[:3] for m in single["moves"]]
    for one, other in zip(first["moves"], single["moves"], strict=True):
        assert one[3:] == pytest.approx(other[3:], rel=1e-5)

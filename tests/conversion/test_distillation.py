import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion import distillation
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.distillation import distill, held_out_kl
from hf_vqlogits.conversion.distillation_state import check_state_file
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.held_out import split
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.streaming import KeptStates
from hf_vqlogits.conversion.training import Training, divergence
from hf_vqlogits.ops import unpack_signs

V, D, R = 60, 16, 24


class Setting:
    """A random head, far from the dense layer that is its teacher."""

    def __init__(self, code_type="sign"):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32)
        self.backbone = GPT2Model(config).eval()
        fields = {"num_codebooks": R} if code_type == "sign" else {"num_codebooks": 6}
        size = 2 if code_type == "sign" else 5
        self.head = VQLogitsHead(
            VQLogitsConfig(text_config=config, code_type=code_type, codebook_size=size, **fields)
        )
        self.weight = torch.randn(V, D)
        self.blocks = torch.randint(0, V, (400, 17))
        self.states = KeptStates(self.backbone, self.blocks)
        accumulator = StatisticsAccumulator(self.weight)
        for hidden in self.states(torch.arange(400)):
            accumulator.update(hidden)
        self.metric = token_metric(self.weight, accumulator.finish())

    def teacher(self, hidden):
        return hidden @ self.weight.T

    def distill(self, steps=20, **options):
        return distill(self.head, self.states, teacher=self.teacher, steps=steps, **options)


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setattr(distillation, "CODE_STEPS", 4)
    return Setting()


@pytest.mark.parametrize("code_type", ["sign", "index"])
def test_divergence_falls_and_the_body_stays(code_type, monkeypatch):
    monkeypatch.setattr(distillation, "CODE_STEPS", 4)
    setting = Setting(code_type)
    body = {k: v.clone() for k, v in setting.backbone.state_dict().items()}
    codes = setting.head.codes.clone()
    done = setting.distill(40, metric=setting.metric, learning_rate=0.1)
    assert done.kl_after < 0.9 * done.kl_before
    assert done.steps == 40
    assert done.stopped is None
    assert not torch.equal(setting.head.codes, codes)
    assert all(torch.equal(v, body[k]) for k, v in setting.backbone.state_dict().items())
    setting.head.check_codes()


@pytest.mark.parametrize(
    ("start", "stays", "stops"), [(1.0, 1.09, 1.11), (0.004, 0.0119, 0.0121), (1e-5, 9e-4, 2e-3)]
)
def test_how_far_a_divergence_may_rise(start, stays, stops):
    for end, stopped in ((stays, False), (stops, True)):
        kls = iter([start, end])
        layer = torch.nn.Linear(1, 1)
        training = Training(layer, lambda kls=kls: next(kls), lambda made, kl: None)
        training.begin(None, "", "")
        training.descend({layer.weight: 0.1}, range(1), lambda step: None)
        assert (training.stopped is not None) == stopped


def test_the_judge_measures_and_the_teacher_teaches(setting):
    """A head that is its teacher has no divergence from it, whatever rounds beside."""
    done = setting.distill(4, judge=setting.head, learning_rate=1e-9)
    assert done.kl_before == pytest.approx(0, abs=1e-6)
    assert setting.distill(4, learning_rate=1e-9).kl_before > 0.1


def test_codes_stay_without_a_metric(setting):
    codes = setting.head.codes.clone()
    done = setting.distill(40, learning_rate=0.1)
    assert done.kl_after < 0.9 * done.kl_before
    assert torch.equal(setting.head.codes, codes)


def test_frozen_bits_stay(setting):
    codes = unpack_signs(setting.head.codes, R)
    done = setting.distill(40, metric=setting.metric, frozen_bits=9)
    after = unpack_signs(setting.head.codes, R)
    assert done.kl_after < done.kl_before
    assert torch.equal(after[:, :9], codes[:, :9])
    assert not torch.equal(after[:, 9:], codes[:, 9:])


def test_what_is_told_is_the_divergence_of_the_head_that_is_kept(setting):
    told, advanced = [], []
    done = setting.distill(
        40,
        metric=setting.metric,
        notify=lambda made, kl: told.append((made, kl)),
        advance=advanced.append,
    )
    assert told == done.history
    assert advanced == sorted(advanced)
    assert set(advanced) >= set(range(32, 41))  # every step of the codebook
    assert done.kl_before == told[0][1]
    assert done.kl_after == min(kl for _, kl in told)
    held, _ = split(setting.blocks, 40, 0)
    kept = held_out_kl(setting.head, setting.states(held), setting.teacher)
    assert kept == pytest.approx(done.kl_after, rel=1e-3)


def test_training_that_diverges_stops_with_the_best_head(setting):
    done = setting.distill(20, learning_rate=1e4)
    assert done.stopped is not None
    assert done.stopped.startswith("the divergence rose from")
    assert done.steps < 20
    assert done.kl_after <= done.kl_before
    held, _ = split(setting.blocks, 20, 0)
    kept = held_out_kl(setting.head, setting.states(held), setting.teacher)
    assert kept == pytest.approx(done.kl_after, rel=1e-3)


def test_codes_that_make_it_worse_are_taken_back(setting, monkeypatch):
    setting.distill(60, metric=setting.metric, learning_rate=0.1)
    codes = setting.head.codes.clone()
    damping = []

    def spoil(head, metric, slope, value, frozen):
        assert torch.equal(head.codes, codes)
        damping.append(value)
        head.codes[:, 0] ^= 255

    monkeypatch.setattr(distillation, "move_codes", spoil)
    setting.distill(40, metric=setting.metric, learning_rate=1e-9)
    assert torch.equal(setting.head.codes, codes)
    assert damping == [4, 8, 16, 32]


def test_the_same_seed_gives_the_same_head(setting):
    start = {k: v.clone() for k, v in setting.head.state_dict().items()}
    results = []
    for seed in (7, 7, 8):
        setting.head.load_state_dict(start)
        setting.distill(10, metric=setting.metric, seed=seed)
        results.append({k: v.clone() for k, v in setting.head.state_dict().items()})
    assert all(torch.equal(results[0][k], results[1][k]) for k in start)
    assert not torch.equal(results[0]["codebook"], results[2]["codebook"])


class Interrupt(Exception):
    """Raised in the place of Ctrl-C."""


@pytest.mark.parametrize("after", [0, 8, 16, 18, 20])
def test_an_interrupted_run_goes_on_to_the_same_head(setting, tmp_path, after):
    start = {k: v.clone() for k, v in setting.head.state_dict().items()}
    whole = setting.distill(20, metric=setting.metric)
    wanted = {k: v.clone() for k, v in setting.head.state_dict().items()}

    setting.head.load_state_dict(start)
    options = {"metric": setting.metric, "state_file": tmp_path / "state"}

    def interrupt(made, kl):
        if made >= after:
            raise Interrupt

    with pytest.raises(Interrupt, match="^$"):
        setting.distill(20, notify=interrupt, **options)
    setting.head.load_state_dict(start)  # a new process fits the same head again
    again = setting.distill(20, **options)
    assert again == whole
    assert all(torch.equal(setting.head.state_dict()[k], wanted[k]) for k in wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"state"}


def test_the_state_of_a_finished_run_spares_the_training(setting, tmp_path, monkeypatch):
    start = {k: v.clone() for k, v in setting.head.state_dict().items()}
    options = {"metric": setting.metric, "state_file": tmp_path / "state"}
    whole = setting.distill(20, **options)
    wanted = {k: v.clone() for k, v in setting.head.state_dict().items()}
    setting.head.load_state_dict(start)
    monkeypatch.setattr(distillation, "held_out_kl", None)  # nothing is judged again
    assert setting.distill(20, **options) == whole
    assert all(torch.equal(setting.head.state_dict()[k], wanted[k]) for k in wanted)
    setting.head.load_state_dict(start)
    with pytest.raises(ConversionError, match="is of another distillation"):
        setting.distill(20, frozen_bits=3, **options)


def test_the_state_of_another_run_is_refused(setting, tmp_path):
    file = tmp_path / "state"
    start = {k: v.clone() for k, v in setting.head.state_dict().items()}
    options = {"state_file": file, "metric": setting.metric}

    def interrupt(made, kl):
        if made > 4:  # the state after four steps has been written
            raise Interrupt

    with pytest.raises(Interrupt, match="^$"):
        setting.distill(20, notify=interrupt, **options)
    kept = file.read_bytes()
    setting.head.load_state_dict(start)
    with pytest.raises(ConversionError, match="is of another distillation"):
        setting.distill(21, **options)
    assert file.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_no_state_is_refused_and_kept(setting, tmp_path):
    file = tmp_path / "thesis"
    file.write_bytes(b"years of work")
    for call in (
        lambda: check_state_file(file, 20),
        lambda: setting.distill(20, state_file=file),
    ):
        with pytest.raises(ConversionError, match="holds no state of a distillation; remove it"):
            call()
    assert file.read_bytes() == b"years of work"


def test_a_disk_that_is_full(setting, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConversionError, match="cannot be written to .*: file write failed. Free"):
        setting.distill(20, state_file=tmp_path / "state", metric=setting.metric)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_codes_do_not_need_go_to_the_codebook(setting, monkeypatch):
    """Where no move of the codes helps, the training is as long all the same."""
    monkeypatch.setattr(distillation, "move_codes", lambda *_: None)
    done = setting.distill(60, metric=setting.metric, learning_rate=0.1)
    made = [steps for steps, _ in done.history]
    assert made[:5] == [0, 4, 8, 12, 16]  # at dampings 4, 8, 16 and 32
    assert made[5:] == [24, 32, 40, 48, 56, 60]
    assert done.kl_after < 0.9 * done.kl_before


def test_divergence_against_a_float64_reference(setting):
    hidden = torch.cat(list(setting.states(torch.arange(3))))
    weight, bias = (t.double() for t in setting.head.to_linear())
    p = torch.log_softmax(setting.teacher(hidden).double(), -1)
    q = torch.log_softmax(hidden.double() @ weight.T + bias, -1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    found = held_out_kl(setting.head, setting.states(torch.arange(3)), setting.teacher)
    assert found == pytest.approx(expected, rel=1e-3)
    same = divergence(setting.teacher(hidden), setting.teacher(hidden))
    assert float(same) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("divergence", [0.024, 400.0])
def test_the_rate_follows_the_divergence(setting, monkeypatch, divergence):
    rates = []
    monkeypatch.setattr(distillation, "held_out_kl", lambda *_: divergence)
    monkeypatch.setattr(
        distillation._HeadTraining, "train_codebook", lambda self, rate: rates.append(rate)
    )
    setting.distill(20)
    assert rates == [pytest.approx(min(0.01, 0.1 * (divergence / R) ** 0.5))]


def test_the_first_steps_of_adam_are_small(setting, monkeypatch):
    """Its first would be as large as the rate in every number, whatever the gradient is."""
    codebooks = []
    original = distillation._HeadTraining._backward

    def watched(self, hidden, levels):
        codebooks.append(self._head.codebook.detach().clone())
        original(self, hidden, levels)

    monkeypatch.setattr(distillation._HeadTraining, "_backward", watched)
    setting.distill(40, learning_rate=0.01)  # without a metric all steps are Adam's
    moved = [float((after - before).abs().max()) for before, after in itertools.pairwise(codebooks)]
    unit = 0.01 * float(codebooks[0].square().mean().sqrt())
    assert len(moved) == 39
    assert moved[0] == 0
    assert moved[1] < 0.3 * unit
    assert max(moved) > 0.7 * unit


def test_too_little_text(setting):
    setting.states = KeptStates(setting.backbone, setting.blocks[:10])
    with pytest.raises(ConversionError, match=r"needs at least 1,343 tokens .* there are 170"):
        setting.distill(1)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_state_file_that_cannot_be(tmp_path, steps):
    place = tmp_path / "missing" / "state" if steps else tmp_path / "state"
    message = "must name a file in a folder" if steps else "but there are no steps to make"
    with pytest.raises(ConversionError, match=message):
        check_state_file(place, steps)


@pytest.mark.parametrize(("steps", "codes"), [(20, 10), (100, 50), (200, 64), (256, 128)])
def test_codes_move_by_whole_iterations(steps, codes):
    assert distillation.steps_for_codes(steps) == codes

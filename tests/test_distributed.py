"""Two processes on a CPU (gloo) compute what one does with the same global batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import PROCESSES, results_of
from safetensors.torch import load_file
from test_examples import EXAMPLES, SCRIPTS, write_inputs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM

STEPS = 3
VOCABULARY = 310  # above 256, so that index codes need int32
CODES = {
    "sign": {"code_type": "sign", "num_codebooks": 21},
    "index": {"code_type": "index", "num_codebooks": 3, "codebook_size": 5},
    "int32": {"code_type": "index", "num_codebooks": 1, "codebook_size": 300},
    "own input codes": {"num_codebooks": 21, "embeddings": "vq"},
    "tied": {"num_codebooks": 21, "embeddings": "tied"},
}


def build(codes: str) -> VQLogitsForCausalLM:
    """A model that is the same in every process."""
    torch.manual_seed(0)
    text_config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return VQLogitsForCausalLM(VQLogitsConfig(text_config=text_config, **CODES[codes])).train()


def global_batch() -> Tensor:
    """Token ids (4, 12) of every step."""
    return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, rank: int, processes: int) -> list[float]:
    """Losses of some steps on this process's share of the batch, averaged over processes."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = global_batch().chunk(processes)[rank]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
    return losses


def shard(model: VQLogitsForCausalLM) -> None:
    """FSDP2 with the head as a unit of its own, as its hooks fire on its `forward`.

    A tied one shares tensors with the embedding, and has to lie in the unit of that.
    """
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.model.backbone.h:
        fully_shard(block, mesh=mesh)
    if model.config.embeddings != "tied":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def ddp(codes: str, rank: int) -> dict:
    model = DistributedDataParallel(build(codes))
    losses = train(model, rank, PROCESSES)
    return {"losses": losses, "state": model.module.state_dict()}


def fsdp(codes: str, rank: int) -> dict:
    model = build(codes)
    shard(model)
    assert type(model.lm_head.codebook.data).__name__ == "DTensor"
    losses = train(model, rank, PROCESSES)
    return {"losses": losses, "state": full_state(model)}


def fsdp_from_rank_0(codes: str, rank: int) -> dict:
    """Weights and codes of rank 0 go to the others, which begin with something else."""
    original = build(codes).state_dict()
    model = build(codes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    shard(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, original if rank == 0 else {}, options=options)
    losses = train(model, rank, PROCESSES)
    return {"losses": losses, "state": full_state(model), "codes": model.lm_head.codes}


WAYS = {way.__name__: way for way in (ddp, fsdp, fsdp_from_rank_0)}


def work(rank: int) -> dict:
    """Every way with every code type."""
    return {(way, codes): WAYS[way](codes, rank) for way in WAYS for codes in CODES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(work, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(results, way, codes):
    single = build(codes)
    losses = train(single, 0, 1)
    assert losses[-1] < losses[0]
    for rank in range(PROCESSES):
        result = results[rank][way, codes]
        # float32, sums in another order
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(losses))
        for name, tensor in single.state_dict().items():
            torch.testing.assert_close(
                result["state"][name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m
            )
    if way == "fsdp_from_rank_0":
        assert torch.equal(results[1][way, codes]["codes"], build(codes).lm_head.codes)


def losses_of(out: str) -> list[float]:
    """The loss curve that an example prints."""
    return [float(loss) for loss in re.findall(r"(?:'loss': '|: loss )([\d.]+)", out)]


def perplexities_of(out: str) -> dict[str, float]:
    return {k: float(v) for k, v in re.findall(r"perplexity (before|after): ([\d.]+)", out)}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_example_on_two_processes(tmp_path, script):
    """The same global batch of 8 rows: 8 at once, or 2 processes with 2 x 2 rows each."""
    write_inputs(tmp_path)
    words = "--model vq --train-data text.txt --context 16 --steps 6 --learning-rate 0.01"
    words += " --logging-steps 1"

    def run(launcher: list[str], output: str, batches: str) -> tuple[list[float], dict, Path]:
        command = [*launcher, str(EXAMPLES / f"{script}.py"), *words.split(), *batches.split()]
        done = subprocess.run(
            [sys.executable, *command, "--output", output],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return losses_of(done.stdout), perplexities_of(done.stdout), tmp_path / output

    words += " --learn-codes 3"
    alone = run([], "one", "--batch-size 8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    together = run(launcher, "two", "--batch-size 2 --gradient-accumulation-steps 2")

    assert len(alone[0]) == 6  # once, not once a process
    assert together[0] == pytest.approx(alone[0], rel=1e-3)  # Trainer prints four digits
    assert together[1] == pytest.approx(alone[1], rel=1e-4)
    stored = load_file(together[2] / "model.safetensors")
    for name, tensor in load_file(alone[2] / "model.safetensors").items():
        torch.testing.assert_close(stored[name], tensor, atol=1e-3, rtol=1e-3)

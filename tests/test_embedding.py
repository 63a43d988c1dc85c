import pytest
import torch
from tiny import VOCABULARY, text_config
from torch import nn
from transformers import AutoModel

from hf_vqlogits.embedding import VQEmbedding, family_scale

IDS = torch.tensor([[0, 3, 60], [5, 0, 3]])


def make(**fields):
    torch.manual_seed(0)
    embedding = VQEmbedding(VOCABULARY, 16, **({"num_codebooks": 19} | fields))
    nn.init.normal_(embedding.offset)
    return embedding


def test_rows_are_signed_means_and_an_offset():
    embedding = make()
    signs = torch.tensor(
        [[2.0 * (int(row[r // 8]) >> r % 8 & 1) - 1 for r in range(19)] for row in embedding.codes]
    )
    wanted = signs.double() @ embedding.codebook.double() / 16 + embedding.offset
    assert embedding.score_scale == 1 / 16
    torch.testing.assert_close(embedding.weight.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embedding(IDS).double(), wanted[IDS], atol=1e-6, rtol=1e-5)


def test_it_looks_like_an_embedding():
    embedding = make(padding_idx=0)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (VOCABULARY, 16)
    assert embedding.weight.shape == (VOCABULARY, 16)
    assert not embedding.weight.requires_grad
    sizes = "61, 16, num_codebooks=19, num_fine_tokens=0, padding_idx=0, embed_scale=None"
    assert repr(embedding) == f"VQEmbedding({sizes})"
    assert embedding.storage() == {
        "float_parameters": 20 * 16,
        "codes_bytes": VOCABULARY * 3,
        "total_bytes": VOCABULARY * 3 + 20 * 16 * 4,
    }


def test_fresh_rows_have_the_size_of_dense_ones():
    embedding = VQEmbedding(1000, 64, num_codebooks=200)
    assert float(embedding.weight.std()) == pytest.approx(0.02, rel=0.1)
    embedding.check_codes()
    with torch.device("meta"):
        assert VQEmbedding(1000, 64, num_codebooks=200).codes.is_meta


def test_nothing_is_learned_from_padding():
    embedding = make(padding_idx=3)
    embedding(IDS).square().sum().backward()
    given = embedding.codebook.grad.clone(), embedding.offset.grad.clone()
    embedding.zero_grad()
    embedding(IDS[IDS != 3]).square().sum().backward()
    torch.testing.assert_close(given[0], embedding.codebook.grad)
    torch.testing.assert_close(given[1], embedding.offset.grad)
    assert embedding(torch.tensor(3)).abs().sum() > 0  # as of a dense row that was trained


def test_padding_beyond_a_smaller_vocabulary_is_none():
    embedding = make(padding_idx=50)
    embedding.set_codes(embedding.codes[:51])
    assert embedding.padding_idx == 50
    embedding.set_codes(embedding.codes[:50])
    assert (embedding.padding_idx, embedding.num_embeddings) == (None, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "scale"), [("gemma3_text", 32**0.5), ("gemma2", 32**0.5), ("biogpt", 32**0.5)]
)
def test_the_familys_scale(family, scale, dtype):
    """As the family's own embedding computes it, in half precision too."""
    dense = AutoModel.from_config(text_config(family)).get_input_embeddings().to(dtype)
    embedding = VQEmbedding.in_place_of(dense, 40).to(dtype)
    assert embedding.embed_scale == pytest.approx(scale)
    assert embedding.padding_idx == dense.padding_idx
    dense.weight.data = embedding.weight.to(dtype)
    ids = torch.arange(VOCABULARY)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(embedding(ids), dense(ids), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mamba", "granite", "gpt_neox"])
def test_most_families_scale_elsewhere(family):
    assert family_scale(AutoModel.from_config(text_config(family)).get_input_embeddings()) is None


class Normed(nn.Embedding):
    def forward(self, input_ids):
        return nn.functional.normalize(super().forward(input_ids), dim=-1)


@pytest.mark.parametrize(
    "dense",
    [Normed(5, 4), nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 5)],
    ids=["normed", "max_norm", "linear"],
)
def test_embeddings_of_another_kind_are_refused(dense):
    with pytest.raises(ValueError, match=f"is a {type(dense).__name__}, whose rows .* stay dense"):
        VQEmbedding.in_place_of(dense, 8)


def test_impossible_codes_are_named():
    embedding = make()
    embedding.check_codes()
    embedding.codes[8, 2] |= 8
    with pytest.raises(ValueError, match="`codes` sets bits above the 19 .* in row 8"):
        embedding.check_codes()

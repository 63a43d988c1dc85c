import math

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.conversion import residual
from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.clustering import cluster_means, kmeans
from hf_vqlogits.conversion.codebooks import fit_index, perplexity_bound
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.sizes import INDEX_METHODS

V, D = 60, 8
SINGLE = ("kmeans", "random", "contiguous", "frequency")


def layer(vocab=V, size=D, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, size, generator=generator), torch.randn(vocab, generator=generator)


def statistics_of(weight, *, shift_invariant=True, seed=1):
    """Statistics as if of a text: skewed frequencies, a mean and contexts that matter."""
    generator = torch.Generator().manual_seed(seed)
    vocab, size = weight.shape
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return CalibrationStatistics(
        positions=5000,
        mean=torch.randn(size, generator=generator, dtype=torch.float64),
        covariance=factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64),
        fisher=torch.rand(vocab, generator=generator, dtype=torch.float64) ** 3 * 100,
        context=torch.randn(vocab, size, generator=generator),
        probability=torch.rand(vocab, generator=generator, dtype=torch.float64) * 200,
        shift_invariant=shift_invariant,
    )


def dense(fit):
    """Weights (V, d) and biases (V,) that the codes stand for, in float64, token by token."""
    rows, biases = [], []
    for codes in fit.codes.tolist():
        rows.append(sum(fit.codebook[g, k].double() for g, k in enumerate(codes)))
        biases.append(sum(fit.codebook_bias[g, k].double() for g, k in enumerate(codes)))
    return torch.stack(rows), torch.stack(biases)


class TestSingleCodebook:
    @pytest.mark.parametrize("method", SINGLE)
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_codeword_is_the_mean_of_its_tokens(self, method, with_bias):
        weight, bias = layer()
        fit = fit_index(
            weight,
            method=method,
            num_codebooks=1,
            codebook_size=7,
            bias=bias if with_bias else None,
            statistics=statistics_of(weight),
        )
        assert fit.codes.shape == (V, 1)
        assert fit.codes.dtype == torch.uint8
        for k in range(7):
            members = (fit.codes[:, 0] == k).nonzero().flatten()
            assert len(members)
            mean = weight[members].double().mean(0)
            torch.testing.assert_close(fit.codebook[0, k].double(), mean, rtol=1e-5, atol=1e-6)
            expected = bias[members].mean().item() if with_bias else 0.0
            assert fit.codebook_bias[0, k].item() == pytest.approx(expected, abs=1e-6)
        lost = (weight - dense(fit)[0]).square().sum()
        spread = (weight - weight.mean(0)).square().sum()
        assert fit.details["error"] == pytest.approx((lost / spread).item(), rel=1e-4)

    @pytest.mark.parametrize("method", INDEX_METHODS)
    @pytest.mark.parametrize("vocab", [256, 257])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_many_codewords_as_tokens_lose_nothing(self, method, vocab, dtype):
        weight, bias = layer(vocab)
        weight, bias = weight.to(dtype), bias.to(dtype)
        fit = fit_index(weight, method=method, num_codebooks=1, codebook_size=vocab, bias=bias)
        assert fit.codes[:, 0].tolist() == list(range(vocab))
        assert fit.codes.dtype == (torch.uint8 if vocab == 256 else torch.int32)
        assert torch.equal(fit.codebook[0], weight.float())
        assert torch.equal(fit.codebook_bias[0], bias.float())
        assert fit.details["error"] == 0

    def test_contiguous_groups_are_ranges_of_ids(self):
        fit = fit_index(layer()[0], method="contiguous", num_codebooks=1, codebook_size=7)
        codes = fit.codes[:, 0].long()
        assert codes.diff().min() == 0
        assert codes.diff().max() == 1
        assert set(codes.bincount().tolist()) == {8, 9}

    def test_frequency_groups_are_ranges_of_ranks(self):
        weight, _ = layer()
        statistics = statistics_of(weight)
        fit = fit_index(
            weight, method="frequency", num_codebooks=1, codebook_size=7, statistics=statistics
        )
        ranked = fit.codes[:, 0].long()[statistics.probability.argsort(descending=True)]
        assert ranked.tolist() == sorted(ranked.tolist())
        assert set(ranked.bincount().tolist()) == {8, 9}

    def test_random_groups_are_of_equal_size_and_follow_the_seed(self):
        def codes(seed):
            fit = fit_index(
                layer()[0], method="random", num_codebooks=1, codebook_size=7, seed=seed
            )
            return fit.codes[:, 0].long()

        assert set(codes(0).bincount().tolist()) == {8, 9}
        assert not torch.equal(codes(0), codes(1))
        assert codes(0).diff().min() < 0


class TestKMeans:
    def test_finds_separate_groups(self):
        generator = torch.Generator().manual_seed(0)
        truth = torch.randperm(300, generator=generator) % 5
        rows = 100 * torch.eye(5, 6)[truth] + torch.randn(300, 6, generator=generator)
        best = min(
            (kmeans(rows, 5, seed=seed) for seed in range(10)),
            key=lambda found: (rows - found[1][found[0]]).square().sum(),
        )
        pairs = set(zip(truth.tolist(), best[0].tolist(), strict=True))
        assert len(pairs) == 5  # one cluster for each group

    def test_is_a_fixed_point_of_lloyd(self):
        weight, _ = layer(200)
        codes, centroids = kmeans(weight, 6, iterations=60)
        nearest = torch.cdist(weight.double(), centroids.double()).argmin(1)
        assert torch.equal(codes, nearest)
        torch.testing.assert_close(centroids, cluster_means(weight, codes, 6))

    def test_leaves_the_number_of_threads_as_it_was(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            kmeans(layer()[0], 4)
            assert torch.get_num_threads() == faiss.omp_get_max_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_uses_all_rows(self):
        """By default faiss would take 256 rows a cluster and end where only those are at rest."""
        rows = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
        codes, centroids = kmeans(rows, 3, iterations=100)
        nearest = torch.cdist(rows.double(), centroids.double()).argmin(1)
        assert (nearest != codes).float().mean() < 2e-4
        expected = torch.tensor([[1 / 6], [1 / 2], [5 / 6]])
        torch.testing.assert_close(centroids.sort(0).values, expected, atol=0.01, rtol=0)

    def test_weights_count(self):
        rows = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
        weight = torch.tensor([3.0, 1.0, 1.0, 1.0])
        codes, centroids = kmeans(rows, 2, weight=weight, iterations=10)
        assert codes[0] == codes[1] != codes[2] == codes[3]
        assert centroids[codes[0]].item() == pytest.approx(0.25)
        # Where the far two are all that counts, they are told apart.
        heavy = torch.tensor([1e-4, 1e-4, 1.0, 1.0])
        found = [kmeans(rows, 2, weight=heavy, iterations=10, seed=seed)[0] for seed in range(9)]
        assert any(codes[2] != codes[3] for codes in found)
        plain = [kmeans(rows, 2, iterations=10, seed=seed)[0] for seed in range(9)]
        assert all(codes[2] == codes[3] for codes in plain)

    @pytest.mark.parametrize("method", [*SINGLE, "residual"])
    def test_same_seed_same_bytes(self, method):
        weight, bias = layer()
        fits = [
            fit_index(
                weight,
                method=method,
                num_codebooks=3 if method == "residual" else 1,
                codebook_size=7,
                bias=bias,
                statistics=statistics_of(weight),
                seed=5,
            )
            for _ in range(2)
        ]
        assert torch.equal(fits[0].codes, fits[1].codes)
        assert torch.equal(fits[0].codebook, fits[1].codebook)
        assert torch.equal(fits[0].codebook_bias, fits[1].codebook_bias)

    def test_seed_matters(self):
        weight, _ = layer()
        assert not torch.equal(kmeans(weight, 7, seed=0)[0], kmeans(weight, 7, seed=1)[0])

    def test_says_nothing(self, capfd):
        kmeans(layer()[0], V - 1)  # faiss warns of so few rows a cluster
        assert capfd.readouterr() == ("", "")

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 40), st.data())
    def test_no_cluster_is_empty(self, vocab, data):
        """Whatever rows are equal; the rows that pad a vocabulary are."""
        kinds = data.draw(st.integers(1, vocab))
        clusters = data.draw(st.integers(1, vocab))
        rows = torch.randn(kinds, 3, generator=torch.Generator().manual_seed(vocab))
        rows = rows[torch.arange(vocab) % kinds]
        codes, centroids = kmeans(rows, clusters, iterations=3)
        assert codes.bincount(minlength=clusters).min() >= 1
        assert len(centroids) == clusters
        assert centroids.isfinite().all()

    def test_progress_sees_every_iteration(self):
        names, steps = [], []

        def progress(name):
            names.append(name)
            return lambda items: (steps.append(i) or i for i in items)

        fit_index(layer()[0], method="kmeans", num_codebooks=1, codebook_size=7, progress=progress)
        assert names == ["k-means"]
        assert steps == list(range(25))

    def test_cluster_without_weight_gets_its_plain_mean(self):
        rows = torch.tensor([[1.0], [3.0], [8.0]])
        means = cluster_means(
            rows, torch.tensor([0, 0, 1]), 2, weight=torch.tensor([0.0, 0.0, 2.0])
        )
        assert means.tolist() == [[2.0], [8.0]]


class TestResidual:
    def errors(self, metric, codes, codebook):
        """Of each token, in float64 and by definition."""
        errors = []
        for v, row in enumerate(metric.rows.double()):
            e = row - sum(codebook[g, k].double() for g, k in enumerate(codes[v].tolist()))
            m = metric.context[v].double()
            errors.append(metric.weight[v].double() * (e @ e + (m @ e) ** 2))
        return torch.stack(errors)

    def test_codes_are_the_best_of_all_in_turn(self, monkeypatch):
        monkeypatch.setattr(residual, "TILE", 17)
        weight, bias = layer()
        metric = token_metric(weight, statistics_of(weight), bias=bias)
        generator = torch.Generator().manual_seed(3)
        codebook = torch.randn(3, 5, D + 1, generator=generator)
        codes = torch.randint(5, (V, 3), generator=generator)
        order = [2, 0, 1]
        expected = codes.clone()
        for g in order:
            trials = []
            for k in range(5):
                trial = expected.clone()
                trial[:, g] = k
                trials.append(self.errors(metric, trial, codebook))
            expected[:, g] = torch.stack(trials).argmin(0)
        assert not torch.equal(codes, expected)
        residual.reencode(metric, codes, codebook, torch.tensor(order))
        assert torch.equal(codes, expected)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
    def test_reencoding_never_makes_a_token_worse(self, groups, size, seed):
        weight, _ = layer(seed=seed)
        metric = token_metric(weight, statistics_of(weight))
        generator = torch.Generator().manual_seed(seed)
        codebook = torch.randn(groups, size, D + 1, generator=generator)
        codes = torch.randint(size, (V, groups), generator=generator)
        before = self.errors(metric, codes, codebook)
        residual.reencode(metric, codes, codebook, torch.randperm(groups, generator=generator))
        after = self.errors(metric, codes, codebook)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()

    @pytest.mark.parametrize("shift_invariant", [True, False])
    def test_recovers_sums_of_codewords(self, shift_invariant):
        """Output vectors that are such sums are found again: the logits are the original ones."""
        generator = torch.Generator().manual_seed(0)
        truth = [
            scale * torch.randn(4, D + 1, generator=generator, dtype=torch.float64)
            for scale in (20.0, 2.0, 0.2)
        ]
        codes = torch.cartesian_prod(*[torch.arange(4)] * 3)
        rows = sum(truth[g][codes[:, g]] for g in range(3))
        weight, bias = rows[:, :-1].float(), rows[:, -1].float()
        mean = torch.randn(D, generator=generator, dtype=torch.float64)
        statistics = CalibrationStatistics(
            positions=1000,
            mean=mean,
            covariance=torch.eye(D, dtype=torch.float64),
            fisher=torch.ones(64, dtype=torch.float64),
            context=mean.float().expand(64, D),
            probability=torch.zeros(64, dtype=torch.float64),
            shift_invariant=shift_invariant,
        )
        fit = min(
            (
                fit_index(
                    weight,
                    method="residual",
                    num_codebooks=3,
                    codebook_size=4,
                    bias=bias,
                    statistics=statistics,
                    seed=seed,
                )
                for seed in range(24)
            ),
            key=lambda fit: fit.details["error"],
        )
        hidden = torch.randn(9, D, generator=generator, dtype=torch.float64)
        found_weight, found_bias = dense(fit)
        logits = hidden @ weight.double().T + bias
        difference = hidden @ found_weight.T + found_bias - logits
        if shift_invariant:  # then a constant added to all logits is none of its business
            difference -= difference.mean(1, keepdim=True)
        assert fit.details["error"] < 1e-5
        assert difference.abs().max() < 0.01 * logits.std()

    def test_details_give_the_error_of_what_is_stored(self):
        weight, bias = layer()
        statistics = statistics_of(weight)
        fit = fit_index(
            weight,
            method="residual",
            num_codebooks=4,
            codebook_size=3,
            bias=bias,
            statistics=statistics,
        )
        assert fit.codes.shape == (V, 4)
        assert fit.codes.dtype == torch.uint8
        assert fit.codebook.shape == (4, 3, D)
        assert fit.codebook_bias.shape == (4, 3)
        # The same error from the stored floats: whiten what they stand for, as the metric does.
        metric = token_metric(weight, statistics, bias=bias)
        found_weight, found_bias = dense(fit)
        offset = found_bias + found_weight @ statistics.mean
        whitened = torch.cat(
            [torch.linalg.solve(metric.unwhiten.double().T, found_weight.T).T, offset[:, None]], 1
        )
        lost = metric.error(metric.rows - whitened.float()).sum()
        expected = (lost / metric.error(metric.rows).sum()).item()
        assert fit.details["error"] == pytest.approx(expected, rel=1e-3)

    def test_refinement_and_more_codebooks_help(self, monkeypatch):
        weight, bias = layer(200, 16)
        options = {"method": "residual", "bias": bias, "statistics": statistics_of(weight)}

        def error(groups, size):
            fit = fit_index(weight, num_codebooks=groups, codebook_size=size, **options)
            return fit.details["error"]

        few, more = error(4, 4), error(12, 4)
        assert more < 0.6 * few
        monkeypatch.setattr(residual, "ROUNDS", 0)
        assert more < 0.9 * error(12, 4)

    def test_tokens_that_matter_are_fitted_best(self):
        weight, _ = layer(200, 16)
        statistics = statistics_of(weight)
        statistics.fisher = torch.ones(200, dtype=torch.float64)
        statistics.fisher[::10] = 1e4
        fit = fit_index(
            weight, method="residual", num_codebooks=6, codebook_size=4, statistics=statistics
        )
        lost = (weight - dense(fit)[0]).square().sum(1)
        assert lost[::10].mean() < 0.3 * lost.mean()

    def test_statistics_are_needed(self):
        weight, _ = layer()
        with pytest.raises(ValueError, match="'residual' needs `statistics` of calibration text"):
            fit_index(weight, method="residual", num_codebooks=8, codebook_size=4)


class TestBound:
    def test_value(self):
        codes = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.uint8)[:, None]
        labels = torch.tensor([[0, 3], [5, 5]])
        expected = math.exp((math.log(3) + math.log(2)) / 4)
        assert perplexity_bound(codes, labels) == pytest.approx(expected)
        assert perplexity_bound(codes[:, 0], labels) == pytest.approx(expected)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10_000), st.floats(0.1, 30))
    def test_no_head_is_below(self, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(5, (40,), generator=generator)
        labels = torch.randint(40, (30,), generator=generator)
        scores = scale * torch.randn(30, 5, generator=generator, dtype=torch.float64)
        scores[torch.arange(30), codes[labels]] += scale  # a good model
        loss = torch.nn.functional.cross_entropy(scores[:, codes], labels)
        assert loss.exp().item() >= perplexity_bound(codes, labels) * (1 - 1e-9)

    def test_perfect_knowledge_of_the_code_reaches_it(self):
        codes = torch.arange(40) % 6
        labels = torch.arange(40)
        scores = 1000.0 * torch.nn.functional.one_hot(codes[labels]).double()
        loss = torch.nn.functional.cross_entropy(scores[:, codes], labels)
        assert loss.exp().item() == pytest.approx(perplexity_bound(codes, labels))

    @pytest.mark.parametrize(
        ("codes", "labels"),
        [(torch.zeros(5, 2), torch.zeros(3)), (torch.zeros(5, 1), torch.zeros(0))],
    )
    def test_needs_one_codebook_and_labels(self, codes, labels):
        with pytest.raises(ValueError, match="one codebook.*at least one label"):
            perplexity_bound(codes.long(), labels.long())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "signs"}, r"`method` must be one of residual, kmeans.*'signs'"),
            ({"codebook_size": V + 1}, r"`codebook_size` 61 is larger than the vocabulary 60"),
            ({"codebook_size": 0}, r"must be at least 1, got 1 and 0"),
            ({"num_codebooks": 0}, r"must be at least 1, got 0 and 7"),
            ({"num_codebooks": 2}, r"'kmeans' has one codebook, but `num_codebooks` is 2"),
            ({"method": "frequency"}, r"'frequency' needs `statistics`"),
            ({"bias": torch.zeros(3)}, r"`bias` must be \(60,\), got shape \(3,\)"),
            ({"bias": torch.full((V,), math.nan)}, r"`bias` holds NaN or infinity"),
        ],
    )
    def test_options(self, options, message):
        options = {"method": "kmeans", "num_codebooks": 1, "codebook_size": 7} | options
        with pytest.raises(ValueError, match=message):
            fit_index(layer()[0], **options)

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.zeros(5), r"must be \(V, d\)"),
            (torch.zeros(0, 5), r"must be \(V, d\)"),
            (torch.full((9, 5), math.inf), "`weight` holds NaN or infinity"),
        ],
    )
    def test_weight(self, weight, message):
        with pytest.raises(ValueError, match=message):
            fit_index(weight, method="random", num_codebooks=1, codebook_size=2)

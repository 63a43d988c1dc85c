"""k-means by faiss, in which every cluster has a member.

Letters: V rows, D columns, K clusters.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import faiss
import torch
from torch import Tensor

ITERATIONS = 25  # faiss's own default
# Below so many products an iteration, threads wait for one another longer than they help.
SMALL_PROBLEM = 1 << 30
CHUNK_ROWS = 1 << 14
SEEDS = 1 << 31  # faiss keeps its seed in a C int


def kmeans(
    rows: Tensor,
    clusters: int,
    *,
    weight: Tensor | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor]:
    """Cluster rows by Euclidean distance, using all of them.

    Args:
        rows: (V, D), finite.
        clusters: K, at most V.
        weight: (V,), how much each row counts; default all the same.
        iterations: of Lloyd's algorithm, each V K D multiplications and additions.
        seed: of the rows that are the first centroids; the same seed and number of threads give
            the same result.
        progress: wraps the iteration.

    Returns:
        codes (V,) int64, in which every cluster occurs, and their weighted means (K, D) float32.
    """
    points = rows.detach().float().cpu().contiguous()
    counts = None if weight is None else weight.detach().float().cpu()
    search = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=1,
        seed=seed % SEEDS,
        # faiss would take 256 rows a cluster, and complain of fewer than 39.
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    with _threads(1 if points.numel() * clusters < SMALL_PROBLEM else torch.get_num_threads()):
        for _ in progress(range(iterations)):
            search.train(
                points.numpy(),
                weights=None if counts is None else counts.numpy(),
                init_centroids=search.centroids,
            )
        codes = torch.from_numpy(search.assign(points.numpy())[1])
    _occupy(codes, points, torch.from_numpy(search.centroids))
    return codes.to(rows.device), cluster_means(points, codes, clusters, weight=counts).to(
        rows.device
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for faiss; PyTorch may share its OpenMP, and gets its own number back."""
    before = torch.get_num_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
        torch.set_num_threads(before)


def cluster_means(
    rows: Tensor, codes: Tensor, clusters: int, *, weight: Tensor | None = None
) -> Tensor:
    """Weighted mean of each cluster's rows, summed in float64.

    Args:
        rows: (V, ...).
        codes: (V,) int64 in 0..K-1, every one of which occurs.
        clusters: K.
        weight: (V,); default all the same. A cluster without any weight gets its plain mean.

    Returns:
        (K, ...) float32.
    """
    counts = torch.ones(len(rows), device=rows.device) if weight is None else weight
    counts = counts.double()
    total = torch.zeros(clusters, dtype=torch.float64, device=rows.device)
    total.index_add_(0, codes, counts)
    counts = torch.where(total[codes] > 0, counts, 1.0)
    flat = rows.reshape(len(rows), -1)
    sums = torch.zeros(clusters, flat.shape[1], dtype=torch.float64, device=rows.device)
    total.zero_().index_add_(0, codes, counts)
    for some, their, count in zip(
        flat.split(CHUNK_ROWS), codes.split(CHUNK_ROWS), counts.split(CHUNK_ROWS), strict=True
    ):
        sums.index_add_(0, their, some.double() * count[:, None])
    return (sums / total[:, None]).float().view(clusters, *rows.shape[1:])


def _occupy(codes: Tensor, rows: Tensor, centroids: Tensor) -> None:
    """Give each empty cluster the row that is farthest from the mean of its own, in place.

    faiss splits clusters to fill empty ones, which cannot help where rows are equal: the rows that
    pad a vocabulary often are.
    """
    members = codes.bincount(minlength=len(centroids)).tolist()
    empty = [cluster for cluster, count in enumerate(members) if not count]
    if not empty:
        return
    distance = torch.cat(
        [
            (some - centroids[their]).square().sum(1)
            for some, their in zip(rows.split(CHUNK_ROWS), codes.split(CHUNK_ROWS), strict=True)
        ]
    )
    for row in distance.argsort(descending=True, stable=True).tolist():
        if not empty:
            return
        crowd = int(codes[row])
        if members[crowd] > 1:
            members[crowd] -= 1
            codes[row] = empty.pop()

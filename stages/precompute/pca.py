"""The PCA for storing dense tokens: fitted once, before the first shard, and kept in the cache."""

from itertools import islice

import numpy as np

from cache.dense import Pca, pca_size
from pipeline.pca import fit_pca
from stages.precompute.shards import ShardJob, in_batches, readable, worker_of

IMAGES, TOKENS = 64, 65_536  # in the sample, at most


def fit_dense_pca(job: ShardJob) -> Pca | None:
    """Fit the PCA to a sample of the teacher's tokens, on a worker; None if dense tokens are not stored as components.

    The sample is up to TOKENS tokens from the first views of up to IMAGES images, drawn with `views.seed`.

    Args:
        job: of all images; its shard is not made.

    Raises:
        UserError: fewer tokens than their width; BrokenFile for an unreadable image, unless these are skipped.
    """
    worker = worker_of(job)
    size = pca_size(worker.config.storage.dense_tokens)
    if size is None:
        return None
    rng = np.random.default_rng(worker.config.views.seed)
    order = rng.permutation(np.arange(job.start, job.stop)).tolist()
    firsts = (samples[0] for samples in islice(readable(worker, job, order), IMAGES))
    tokens = [np.empty((0, worker.teacher.width), np.float32)]
    for batch in in_batches(firsts, job.precompute.batch_size):
        _, _, dense_tokens = worker.encode(worker.batch(batch))
        tokens.append(dense_tokens.cpu().numpy().reshape(-1, worker.teacher.width))
    sample = np.concatenate(tokens)
    if len(sample) > TOKENS:
        sample = sample[np.sort(rng.choice(len(sample), TOKENS, replace=False))]
    return Pca(*fit_pca(sample, size))

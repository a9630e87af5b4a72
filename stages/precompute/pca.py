"""The PCA that a cache's dense tokens are stored by: fitted once, before the first shard, and kept in the cache."""

from itertools import islice

import numpy as np

from cache.dense import Pca, pca_size
from pipeline.pca import fit_pca
from stages.precompute.shards import ShardJob, in_batches, readable, worker_of

IMAGES, TOKENS = 64, 65_536  # in the sample, at most


def fit_dense_pca(job: ShardJob) -> Pca | None:
    """Runs on a worker: the PCA of the teacher's tokens of a sample; None where dense tokens are stored otherwise.

    The sample is the first view of up to IMAGES images drawn by `views.seed`, and of their tokens up to TOKENS.

    Args:
        job: of all images; its shard is not made.

    Raises:
        UserError: fewer tokens than their width; BrokenFile for an image that cannot be read and may not be left out.
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

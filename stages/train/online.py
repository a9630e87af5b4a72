"""The teacher in the training loop: a reference for the cache's results and speed.

It is stage one's teacher on stage one's views, with the same code except for the cache's float16. The last bits of sums
depend on the batch, and in rare cases so does a pseudo label.
"""

from torch import Tensor, from_numpy
from torch.random import fork_rng

from cache.reader import Cache
from configs.errors import UserError
from configs.schema import Config
from pipeline.data.training import LiveView
from pipeline.data.views import normalise
from pipeline.pseudo_labels import pseudo_labels
from pipeline.pseudo_labels.regions import most_groups, region_tokens
from pipeline.teacher.teacher import fingerprint, load_teacher, tokens_along


class LiveTeacher:
    """Encodes and labels every batch.

    Attributes:
        live: its input from the loader.
    """

    def __init__(self, config: Config, cache: Cache, device: str) -> None:
        """UserError if the teacher's files are not those that made `cache` and its class features."""
        for part, digest in fingerprint(config.teacher).items():
            if cache.manifest.settings["files"][part] != digest:
                raise UserError(
                    f"teacher.{part} {getattr(config.teacher, part)} has changed since {cache.location} was made: "
                    "precompute again"
                )
        self._device, self._pseudo_labels, self._kmeans = device, config.pseudo_labels, cache.manifest.kmeans
        how = config.precompute
        with fork_rng(devices=[]):  # random weights must not change the student's random numbers
            self._teacher = load_teacher(config.teacher, device, how.channels_last, how.compile)
        fresh = config.views if config.train.teacher == "fresh" else None
        grid = tokens_along(config.views.size, self._teacher.stride, config.teacher.model)
        self.live = LiveView(self._teacher.mean, grid, fresh)
        self._most = most_groups(config.pseudo_labels, self.live.grid) if config.loss.local else None

    def __call__(self, loaded: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """As stages.train.batches.Teacher."""
        pixels = normalise(loaded["shown"], self._teacher.mean, self._teacher.std, self._device)
        cls_tokens, dense_tokens = self._teacher.encode(pixels)
        groups = pseudo_labels(dense_tokens, loaded["unannotated"].numpy(), self._pseudo_labels, self._kmeans)[1]
        regions = None if self._most is None else from_numpy(region_tokens(dense_tokens, groups, self._most))
        return cls_tokens.clone(), from_numpy(groups), regions  # cloned, as autograd may need it

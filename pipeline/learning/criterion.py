"""The training objective, Eq. 8: computes the losses from student features and cached teacher outputs."""

import torch
from torch import Tensor, nn

from configs.schema import Loss
from pipeline.learning.bank import TokenBank
from pipeline.learning.glm import info_nce, predict_cls
from pipeline.learning.labels import UNLABELLED, at_stride, class_centroids, fuse_labels, layout
from pipeline.learning.local import region_loss, tokens_of_groups
from pipeline.learning.losses import prototype_bce
from pipeline.learning.pixel_loss import pixel_losses
from pipeline.learning.ranks import gathered
from pipeline.learning.synthesizer import make_synthesizer
from pipeline.transfer import sent

AUXILIARY_WEIGHT = 0.4  # mmsegmentation's


class Criterion(nn.Module):
    """The losses, with the other trained parameters (alpha, the synthesizer) and the CLS token bank."""

    def __init__(self, config: Loss, text_seen: Tensor, accumulate: int = 1) -> None:
        """`text_seen`: (K, C) unit-length text features of the seen classes. `accumulate`: calls per iteration."""
        super().__init__()
        self.config = config
        self.register_buffer("text_seen", text_seen)
        self.alpha = nn.Parameter(torch.tensor(config.alpha))
        self.synthesizer = make_synthesizer(config.synthesizer, text_seen.shape[1])
        self.bank = TokenBank(config.bank * accumulate)

    def forward(
        self,
        features: Tensor,
        cls_token: Tensor,
        seen: Tensor,
        groups: Tensor,
        image_ids: Tensor,
        region_tokens: Tensor | None = None,
        auxiliary: Tensor | None = None,
        progress: float = 0.0,
        on_cpu: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The enabled losses by their names in Eq. 8. The objective is their sum (averaged over ranks).

        Args:
            features: (B, C, h, w) the student's R.
            cls_token: (B, C) teacher CLS tokens S of the same views, unnormalised.
            seen: (B, H, W) uint8 seen classes, 255 = unannotated.
            groups: (B, G, G) uint8 pseudo labels, 255 = annotated.
            image_ids: (B,) which image each view shows.
            region_tokens: (B, M, C) int8 directions of the groups' mean dense tokens; needed where `loss.local` is on.
            auxiliary: (B, C, h', w') features of an auxiliary head, trained with cross-entropy on the seen classes
                only, unless `loss.ce` is off.
            progress: finished fraction of the training, 0 to 1.
            on_cpu: `seen` and `groups` in the CPU's memory; a GPU is waited for where they have to be fetched.
        """
        losses: dict[str, Tensor] = {}
        cls_tokens, all_ids = gathered(cls_token), gathered(image_ids)
        if self.config.global_:
            query = nn.functional.normalize(cls_token, dim=1) if self.config.unit_query else cls_token
            predicted = gathered(predict_cls(features, query, self.config.glm, progress))
            bank, bank_ids = self.bank.tokens(cls_tokens, all_ids)
            losses["global"] = info_nce(predicted, cls_tokens, bank, self.config.tau, all_ids, bank_ids)
            self.bank.enqueue(cls_tokens, all_ids)

        text_seen: Tensor = self.text_seen  # type: ignore[assignment]
        num_seen, size = len(text_seen), (features.shape[2], features.shape[3])
        plan = layout(*(on_cpu or (seen.cpu(), groups.cpu())), num_seen, size)
        labels = fuse_labels(seen, groups, sent(plan.first, seen.device))
        centroids, present = class_centroids(features, at_stride(labels, size), plan.total)
        if self.config.local:
            assert region_tokens is not None
            told = tokens_of_groups(region_tokens, plan.groups) * present[num_seen:, None]
            of_regions = region_loss(centroids[num_seen:], told, self.config.tau)
            losses["local"] = self.config.local_weight * of_regions
        rows = sent(plan.rows, labels.device)
        prototypes = centroids[rows]
        if len(rows):
            prototypes = self.synthesizer(prototypes, cls_tokens)
        of_seen, pseudo = prototypes.split([plan.classes, len(rows) - plan.classes])
        if self.config.bce:
            losses["bce"] = prototype_bce(of_seen, rows[: plan.classes], text_seen, self.config.bce_negatives)
        if self.config.nel or self.config.ce:
            size = (-(-seen.shape[1] // self.config.label_stride), -(-seen.shape[2] // self.config.label_stride))
            target = sent(plan.channels, labels.device)[at_stride(labels, size)]
            if self.config.unit_features:
                features = nn.functional.normalize(features, dim=1)
                auxiliary = None if auxiliary is None else nn.functional.normalize(auxiliary, dim=1)
            of_nel = (num_seen if self.config.nel_channels == "seen" else num_seen + len(pseudo)) * self.config.nel
            alpha, beta, ce = self.alpha, self.config.beta, self.config.ce
            found = pixel_losses(features, text_seen, pseudo, alpha, beta, target, of_nel, ce)
            if self.config.nel:
                losses["nel"] = self.config.nel_weight * found["nel"]
            if ce:
                losses["ce"] = found["ce"]
            if ce and auxiliary is not None:
                own = torch.where(target < num_seen, target, UNLABELLED)
                found = pixel_losses(auxiliary, text_seen, pseudo[:0], alpha, beta, own, 0)
                losses["auxiliary"] = AUXILIARY_WEIGHT * found["ce"]
        return losses

"""Di[M]O: match the teacher on the student's own, re-masked samples (arXiv 2503.15457)."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from distill.divergence import generalised_jeffreys
from distill.memory import widen_weights
from distill.objectives.base import DistillState, Objective, ObjectiveLosses, with_value_and_gradient
from softgen.distributed import masked_mean, mean_over_ranks
from softgen.guidance import check_guidance, guided_logits
from softgen.loading import check_same_sites, load_model
from softgen.masking import MaskLaw, draw_mask_ratio, exact_mask, mask_counts
from softgen.models.base import MaskedDiffusionModel
from softgen.models.text import freeze_text_encoder
from softgen.pretrained import Pretrained
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.optimization import OptimizerConfig, ParameterGroup, hidden_matrices
from softgen.training.targets import hard_cross_entropy


class DiMO(Objective):
    """Distribution matching on masked states of the student's own tokens.

    The auxiliary model learns the student's distribution; the student's logits move along the gradient of the
    divergence between auxiliary and teacher at the masked sites.

    Args:
        beta: Generalised Jeffreys: 0 forward KL, 1 reverse KL, -0.2 in a published recipe.
        guidance: Scale of the teacher's classifier-free guidance; 1 is off.
        guidance_schedule: `constant`, or `linear`: from 1 where all is masked to the scale where nothing is. What an
            all-masked teacher says of single sites is right unguided; guided, each of them shows what was asked for.
        mask_law: Of the re-mask ratio.
        mask_range: Least and largest re-mask ratio, in [0, 1]; what the law draws outside is moved to the nearer one.
        teacher_temperature: Divides the teacher's logits, above 0.
        auxiliary_temperature: Divides the auxiliary's logits in the divergence, above 0.
        reduction: `sum` over masked sites, then the mean over the batch (published); `mean` over both.
        auxiliary: Folder or hub id of the auxiliary model to go on from, which a Di[M]O run leaves as `auxiliary`
            beside its student; by default a copy of the teacher.
        auxiliary_optimizer: Settings of the auxiliary model; by default those of the student.
        auxiliary_label_smoothing: Of its cross-entropy, in [0, 1].
        freeze_embedding: Keep its token embedding as the teacher's.
        critic_only_steps: Steps at the start in which only critics learn.
        weight: Of this term in the summed loss.
    """

    name = "dimo"

    def __init__(
        self,
        *,
        beta: float = 0.0,
        guidance: float = 2.0,
        guidance_schedule: Literal["constant", "linear"] = "constant",
        mask_law: MaskLaw = "arccos",
        mask_range: tuple[float, float] = (0.0, 1.0),
        teacher_temperature: float = 1.0,
        auxiliary_temperature: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
        auxiliary: str | None = None,
        auxiliary_optimizer: OptimizerConfig | None = None,
        auxiliary_label_smoothing: float = 0.1,
        freeze_embedding: bool = True,
        critic_only_steps: int = 0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if not math.isfinite(beta):
            raise ValueError(f"DiMO.beta: expected a finite number, got {beta}")
        for name, value in (
            ("teacher_temperature", teacher_temperature),
            ("auxiliary_temperature", auxiliary_temperature),
        ):
            if not value > 0:
                raise ValueError(f"DiMO.{name}: expected a number above 0, got {value}")
        if not 0 <= auxiliary_label_smoothing <= 1:
            raise ValueError(
                f"DiMO.auxiliary_label_smoothing: expected a number in [0, 1], got {auxiliary_label_smoothing}"
            )
        if guidance_schedule not in ("constant", "linear"):
            raise ValueError(f"DiMO.guidance_schedule: expected constant or linear, got {guidance_schedule!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"DiMO.reduction: expected sum or mean, got {reduction!r}")
        draw_mask_ratio(mask_law, torch.zeros(1), key="DiMO.mask_law")
        if not 0 <= mask_range[0] <= mask_range[1] <= 1:
            raise ValueError(f"DiMO.mask_range: expected 0 <= least <= largest <= 1, got {list(mask_range)}")
        if critic_only_steps < 0:
            raise ValueError(f"DiMO.critic_only_steps: expected at least 0, got {critic_only_steps}")
        if auxiliary_optimizer is not None:
            auxiliary_optimizer.check(key="DiMO.auxiliary_optimizer")
        self.beta = beta
        self.guidance = guidance
        self.guidance_schedule = guidance_schedule
        self.mask_law = mask_law
        self.mask_range = mask_range
        self.teacher_temperature = teacher_temperature
        self.auxiliary_temperature = auxiliary_temperature
        self.reduction = reduction
        self.auxiliary_source = auxiliary
        self.auxiliary_optimizer = auxiliary_optimizer
        self.auxiliary_label_smoothing = auxiliary_label_smoothing
        self.freeze_embedding = freeze_embedding
        self.critic_only_steps = critic_only_steps
        self.auxiliary: MaskedDiffusionModel

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        """The auxiliary model starts as a copy of the teacher, or where an earlier run left it."""
        check_guidance(teacher, self.guidance, key="DiMO.guidance")
        if self.auxiliary_source is None:
            self.auxiliary = copy.deepcopy(teacher)
        else:
            self.auxiliary = widen_weights(load_model(self.auxiliary_source, key="DiMO.auxiliary"))
            check_same_sites(self.auxiliary, teacher, key="DiMO.auxiliary")
        self.auxiliary.requires_grad_().train()
        freeze_text_encoder(self.auxiliary)
        if self.freeze_embedding:
            for parameter in self.auxiliary.embedding_parameters():
                parameter.requires_grad = False

    def forward(self, state: DistillState) -> ObjectiveLosses:
        """Re-mask, compare auxiliary and teacher, train the auxiliary on the student's tokens."""
        mask = self._remask(state)
        masked_tokens = state.tokens.masked_fill(mask, state.teacher.mask_id)
        with torch.no_grad():
            teacher_logits = guided_logits(
                state.teacher, state.teacher.embed(masked_tokens), state.condition, scale=self._guidance_scale(mask)
            )
        auxiliary_logits = self.auxiliary(self.auxiliary.embed(masked_tokens), state.condition)

        divergence = generalised_jeffreys(
            auxiliary_logits / self.auxiliary_temperature,
            teacher_logits / self.teacher_temperature,
            beta=self.beta,
        )
        site_weights = self._site_weights(mask.to(divergence.value.dtype))
        value = (divergence.value * site_weights).sum()
        gradient = divergence.gradient * site_weights.unsqueeze(-1)
        cross_entropy = hard_cross_entropy(
            auxiliary_logits, state.tokens, label_smoothing=self.auxiliary_label_smoothing
        )
        return ObjectiveLosses(
            generator=with_value_and_gradient(state.logits, gradient, value),
            critic=masked_mean(cross_entropy, mask),
            logs={"divergence_per_site": masked_mean(divergence.value, mask)},
        )

    def _remask(self, state: DistillState) -> Tensor:
        noise = state.noise(self.name)
        sites = state.teacher.num_sites
        ratio = draw_mask_ratio(self.mask_law, noise.uniform()).clamp(*self.mask_range)
        counts = mask_counts(ratio, sites)
        return exact_mask(counts, noise.uniform(sites))

    def _guidance_scale(self, mask: Tensor) -> float | Tensor:
        """The scale for masks (B, N), or scales (B, 1, 1)."""
        if self.guidance_schedule == "constant" or self.guidance == 1:
            return self.guidance
        visible = 1 - mask.float().mean(dim=1)
        return 1 + (self.guidance - 1) * visible[:, None, None]

    def _site_weights(self, mask: Tensor) -> Tensor:
        """Weights (B, N) that reduce per-site values to the loss; the mask as 0 and 1 in their dtype."""
        if self.reduction == "sum":
            return mask / mask.shape[0]
        return mask / mean_over_ranks(mask.sum())

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """One group, `auxiliary`."""
        config = self.auxiliary_optimizer or self.default_optimizer
        yield ParameterGroup(
            "auxiliary", list(self.auxiliary.parameters()), config, matrices=hidden_matrices(self.auxiliary)
        )

    def exports(self) -> Mapping[str, Pretrained]:
        """The auxiliary model."""
        return {"auxiliary": self.auxiliary}

    def metadata(self) -> Mapping[str, float]:
        """The teacher's guidance, at which teacher and student compare."""
        return {"guidance": self.guidance}

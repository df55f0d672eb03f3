"""SoftDiMO: one student pass a step, and the objectives that share it."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from distill.memory import halve_around_codebook, kept_casts, recompute
from distill.objectives.base import DistillState, Objective
from distill.objectives.dimo import DiMO
from distill.opening import MASK_UNIT, NOISE, R_INIT, open_student, open_teacher, open_tokenizer
from distill.symptoms import warn_of_cut_weights, warn_of_lost_gradients
from distill.weighting import weigh
from softgen.callbacks.accuracy import AccuracyWatch
from softgen.categorical import sample_categorical
from softgen.data.base import Batch, ImageDataModule
from softgen.loading import check_compatible
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Asked, Condition
from softgen.models.generator import MaskUnit, OneStepGenerator
from softgen.models.text import freeze_text_encoder
from softgen.pretrained import Pretrained
from softgen.relaxation import decoding_gap, probabilities, sharpness
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.optimization import OptimizerConfig, ParameterGroup, hidden_matrices
from softgen.training.stage import Stage, check_conditions

_GAP_GROWTH = 1.5


class SoftDiMO(Stage):
    """Distil a teacher into a one-step generator: L_gen = L_DiMO + w_gan L_GAN + w_reward L_reward.

    Args:
        teacher: Folder or hub id of the masked diffusion model, or the model itself. Stays frozen.
        tokenizer: Folder or hub id, or the tokenizer itself; by default the one in the teacher's folder. Used for
            previews and by objectives that look at images.
        student: Folder or hub id of a generator to start from, which keeps its own r_init, noise and mask unit;
            by default a copy of the teacher.
        objectives: The terms of L_gen, e.g. `distill.DiMO`; by default Di[M]O alone.
        optimizer: Settings of the student, and of every critic that has none of its own.
        r_init: Share of masks in the initial tokens, in [0, 1].
        noise: Weight of the Gaussian noise on the initial embeddings, in [0, 1].
        mask_unit: Whether r_init counts single `site`s, or whole `token`s, all sites of which are masked together; the
            two differ where a token has several sites, as in MaskBit.
        temperature: Of the tokens that the student samples in training, above 0. With relaxations of the same
            temperature a student whose logits are far apart can be moved again; what it leaves is sampled at 1.
        sharpen: Divides the student's logits once, before training, for good; below 1 makes a blunt student sharp.
        freeze_embedding: Keep the student's token embedding as the teacher's.
        frozen_dtype: Of the weights of the frozen teacher and tokenizer; bfloat16 halves them and needs the precision
            bf16-mixed. Codebooks stay as they are, and so does the tokenizer that is saved beside the student, of which
            a copy is kept in main memory. Whatever teacher and student were saved in, what is trained is in float32.
        compile_blocks: Compile the blocks of student, teacher and auxiliary model with `torch.compile`.
        checkpoint_activations: Recompute the blocks of student, teacher and auxiliary model in the backward pass
            instead of keeping their activations, and the narrower copies of weights that autocast makes: less memory,
            more time. Of this run alone: the student's saved config keeps what it had. False leaves each model as it
            was saved.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        teacher: str | MaskedDiffusionModel,
        tokenizer: str | ImageTokenizer | None = None,
        student: str | OneStepGenerator | None = None,
        objectives: Sequence[Objective] | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup_steps=100),  # noqa: B008 - frozen
        r_init: float = R_INIT,
        noise: float = NOISE,
        mask_unit: MaskUnit = MASK_UNIT,
        temperature: float = 1.0,
        sharpen: float = 1.0,
        freeze_embedding: bool = True,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        compile_blocks: bool = False,
        checkpoint_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        for name, value in (("temperature", temperature), ("sharpen", sharpen)):
            if not 0 < value < math.inf:
                raise ValueError(f"model.{name}: expected a finite number above 0, got {value}")
        if frozen_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.frozen_dtype: expected float32 or bfloat16, got {frozen_dtype!r}")
        self.temperature = temperature
        self.hold_frozen("teacher", open_teacher(teacher))
        decoder = open_tokenizer(tokenizer, teacher)
        if decoder is not None:
            check_compatible(self.teacher, decoder, key="model.tokenizer")
            self.hold_frozen("tokenizer", decoder)

        self.student = open_student(student, self.teacher, r_init=r_init, noise=noise, mask_unit=mask_unit)
        self.student.scale_logits(1 / sharpen)
        self.student.requires_grad_().train()
        freeze_text_encoder(self.student.model)
        if freeze_embedding:
            for parameter in self.student.model.embedding_parameters():
                parameter.requires_grad = False
        self.objectives = nn.ModuleList(objectives if objectives is not None else [DiMO()])
        if len(self.objectives) == 0:
            raise ValueError("model.objectives: expected at least one objective, got none")
        names = [objective.name for objective in self._objectives()]
        if len(set(names)) < len(names):
            raise ValueError(f"model.objectives: expected objectives of different names, got {', '.join(names)}")
        for objective in self._objectives():
            self._set_up(objective)
        if next(iter(self._objectives())).weight == "auto":
            raise ValueError(f"{names[0]}.weight: expected a number for the first objective, the anchor, got 'auto'")
        self._smallest_gap = math.inf
        self.frozen_dtype = frozen_dtype
        self._keep_casts = not checkpoint_activations
        # A plain dict, as for the frozen modules: neither moved nor registered.
        self._exported = {"tokenizer": decoder}
        if frozen_dtype == "bfloat16":
            # Student and critics began as copies of the teacher: only now may it lose precision.
            self.teacher.to(torch.bfloat16)
            if decoder is not None:
                self._exported["tokenizer"] = copy.deepcopy(decoder)
                halve_around_codebook(decoder)
        for model in self._masked_models():
            if checkpoint_activations:
                recompute(model)
            if compile_blocks:
                model.compile_blocks()

    def setup(self, stage: str) -> None:
        """As every stage; and say so when nobody watches that the samples stay of their class."""
        super().setup(stage)
        self._check_precision()
        refining = [objective.name for objective in self._objectives() if objective.needs_tokenizer]
        watches = [callback for callback in self.trainer.callbacks if isinstance(callback, AccuracyWatch)]  # type: ignore[attr-defined]
        if stage == "fit" and refining and self.teacher.num_classes and not any(watch.watching for watch in watches):
            rank_zero_warn(
                f"Class accuracy is not watched while {', '.join(refining)} moves the student: "
                "accuracy_watch.classifier takes the folder of an independent classifier"
            )

    def _check_precision(self) -> None:
        """Half precision that gradients taken inside the step, or heads in float32, cannot work in is refused."""
        precision = self.trainer.precision
        if self.frozen_dtype == "bfloat16" and precision != "bf16-mixed":
            raise ValueError(f"model.frozen_dtype: expected bfloat16 with precision bf16-mixed alone, got {precision}")
        refined = [objective for objective in self._objectives() if objective.needs_tokenizer]
        inside = refined or [objective for objective in self._objectives() if objective.weight == "auto"]
        if (refined and precision in ("16-true", "bf16-true")) or (inside and precision == "16-mixed"):
            raise ValueError(
                f"trainer.precision: expected 32-true or bf16-mixed, since {inside[0].name} takes gradients of its "
                f"own and keeps float32, got {precision}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also what the warning about the gap compares with, and the scale of the logits, which no weight holds."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["soft_dimo"] = {
            "smallest_gap": self._smallest_gap,
            "logit_scale": self.student.logit_scale,
            "frozen_dtype": self.frozen_dtype,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume at another scale of the logits, or with frozen weights of another type.

        Raises:
            ValueError: Naming what differs.
        """
        kept = checkpoint.get("soft_dimo", {})
        dtype = kept.get("frozen_dtype", self.frozen_dtype)
        if dtype != self.frozen_dtype:  # it would look like another teacher
            raise ValueError(f"model.frozen_dtype: expected {dtype} as the checkpoint's run, got {self.frozen_dtype}")
        super().on_load_checkpoint(checkpoint)
        expected, got = kept.get("logit_scale", self.student.logit_scale), self.student.logit_scale
        if expected != got:
            raise ValueError(f"model.sharpen: expected a student whose logits are scaled by {expected}, got {got}")
        self._smallest_gap = kept.get("smallest_gap", self._smallest_gap)

    def _set_up(self, objective: Objective) -> None:
        if objective.needs_tokenizer and self.tokenizer is None:
            raise ValueError(f"model.tokenizer: expected a tokenizer, since {objective.name} decodes images, got none")
        objective.default_optimizer = self.optimizer_config
        objective.setup(self.teacher, self.tokenizer)
        for name, module in objective.frozen_modules().items():
            self.hold_frozen(f"{objective.name}.{name}", module)
        self.student.metadata.update(objective.metadata())

    def _masked_models(self) -> Iterable[MaskedDiffusionModel]:
        """The student's network, the teacher, and those of the objectives, trained or looked through, each once."""
        held = (module for root in (self, *self.frozen_modules.values()) for module in root.modules())
        return dict.fromkeys(module for module in held if isinstance(module, MaskedDiffusionModel))

    def _objectives(self) -> Iterable[Objective]:
        for objective in self.objectives:
            assert isinstance(objective, Objective)
            yield objective

    @property
    def teacher(self) -> MaskedDiffusionModel:
        """The frozen teacher."""
        teacher = self.frozen("teacher")
        assert isinstance(teacher, MaskedDiffusionModel)
        return teacher

    @property
    def tokenizer(self) -> ImageTokenizer | None:
        """The frozen tokenizer, if there is one."""
        tokenizer = self.frozen("tokenizer")
        assert tokenizer is None or isinstance(tokenizer, ImageTokenizer)
        return tokenizer

    @property
    def product(self) -> OneStepGenerator:
        """The student."""
        return self.student

    @property
    def tokenizer_beside(self) -> ImageTokenizer | None:
        """The tokenizer of the teacher, as it was opened."""
        return self._exported["tokenizer"]

    @property
    def beside(self) -> Mapping[str, Pretrained]:
        """The critics that a later run can go on from."""
        exports: dict[str, Pretrained] = {}
        for objective in self._objectives():
            exports.update(objective.exports())
        return exports

    def check_data(self, data: ImageDataModule) -> None:
        """The classes must be the teacher's; objectives that look at real images must get some."""
        check_conditions(data, self.teacher)
        for objective in self._objectives():
            if not objective.needs_images:
                continue
            if not data.has_images:
                raise ValueError(f"data: expected real images or tokens, since {objective.name} needs them, got none")
            assert self.tokenizer_beside is not None, "objectives that need images need a tokenizer"
            self.check_images(data, self.tokenizer_beside)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One on-policy pass of the student, then every objective on it."""
        with kept_casts(wanted=self._keep_casts):
            state = self._student_pass(batch)
            objectives = {objective.name: objective for objective in self._objectives()}
            results = {name: objective(state) for name, objective in objectives.items()}
            terms = weigh(results, objectives, state.logits)
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        for name, result in results.items():
            losses[name] = terms[name].loss
            if result.critic is not None:
                losses[f"{name}_critic"] = result.critic
            logs.update({f"{name}_{key}": value for key, value in result.logs.items()})
            if objectives[name].weight == "auto":
                logs[f"{name}_weight"] = torch.as_tensor(terms[name].weight)
        return self.report(batch, losses, logs)

    def _student_pass(self, batch: Batch) -> DistillState:
        noise = self.noise(batch, "student")
        asked = self.asked_of(batch, self.teacher)
        condition = self._encode(asked)
        logits = self.student(self.student.init(noise), condition)
        tokens = sample_categorical(logits.detach(), noise, temperature=self.temperature)
        return DistillState(
            student=self.student,
            teacher=self.teacher,
            tokenizer=self.tokenizer,
            asked=asked,
            condition=condition,
            logits=logits,
            tokens=tokens,
            batch=batch,
            step=self.global_step,
            student_step=self._student_step,
            noise=lambda stream: self.noise(batch, stream),
        )

    @torch.no_grad()
    def _encode(self, asked: Asked) -> Condition:
        """Once a step, by the teacher: student and auxiliary keep its text encoder as it is."""
        return self.teacher.encode(asked)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """While critics learn alone, the student has no gradient: Adam leaves it and its moments as they are."""
        if self.global_step < self._critic_steps:
            for parameter in self.student.parameters():
                parameter.grad = None

    @property
    def _critic_steps(self) -> int:
        """Steps at the start in which the student is held."""
        return max(objective.critic_only_steps for objective in self._objectives())

    @property
    def _student_step(self) -> int:
        """Optimizer steps of the student done."""
        return max(0, self.global_step - self._critic_steps)

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """`student`, and one a critic."""
        student = ParameterGroup(
            "student",
            list(self.student.parameters()),
            self.optimizer_config,
            first_step=self._critic_steps,
            matrices=hidden_matrices(self.student),
        )
        groups = [student]
        for objective in self._objectives():
            groups.extend(objective.parameter_groups())
        return groups

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """How sharp the student is, and how far apart soft and sampled decoding, at the temperatures of training."""
        noise, asked = self.noise(batch, "validation"), self.asked_of(batch, self.teacher)
        logits = self.student.logits(self.student.init(noise), self._encode(asked))
        table = self.tokenizer.codebook if self.tokenizer is not None else None
        measured = sharpness(logits, table)
        values = {
            "max_probability": measured.max_probability,
            "entropy": measured.entropy,
            "covariance_trace": measured.covariance_trace,
            "margin": measured.margin,
        }
        if self.tokenizer is not None:
            tokenizer = self.tokenizer.under(asked)
            tokens = sample_categorical(logits, noise, temperature=self.temperature)
            gaps = [
                decoding_gap(
                    probabilities(logits, temperature=temperature),
                    tokens,
                    decode_soft=lambda probs: tokenizer.decode_embeddings(tokenizer.embed_soft(probs)),
                    decode_hard=tokenizer.decode,
                )
                for temperature in self._relaxation_temperatures()
            ]
            values["relaxation_gap"] = torch.stack(gaps).amax()
        self.report_validation(batch, values)

    def _relaxation_temperatures(self) -> set[float]:
        """Those of the objectives that use soft embeddings; 1 where none does."""
        relaxations = [objective.relaxation for objective in self._objectives() if objective.relaxation is not None]
        return {relaxation.temperature_at(self._student_step) for relaxation in relaxations} or {1.0}

    def on_validation_epoch_end(self) -> None:
        """Warn of automatic weights that are cut, of lost gradients, and of a soft decoding far from the samples."""
        metrics = self.trainer.callback_metrics
        warn_of_cut_weights(self._objectives(), metrics)
        if "val/margin" in metrics:
            warn_of_lost_gradients(self._objectives(), metrics, step=self._student_step)
        self._warn_of_wider_gap()

    def _warn_of_wider_gap(self) -> None:
        """Whatever uses soft embeddings is then less to be trusted."""
        gap = self.trainer.callback_metrics.get("val/relaxation_gap")
        if gap is None or self.trainer.sanity_checking:
            return
        value = float(gap)
        if value > _GAP_GROWTH * self._smallest_gap:
            rank_zero_warn(
                f"The gap between soft and sampled decoding grew from {self._smallest_gap:.3f} to {value:.3f}: the "
                "student is getting blunter, and soft embeddings a worse stand-in for its tokens"
            )
        self._smallest_gap = min(self._smallest_gap, value)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor | None:
        """One-step samples under the batch's conditions; None without a tokenizer to decode them."""
        if self.tokenizer is None:
            return None
        small = {**batch, "ordinal": batch["ordinal"][:32]}
        asked = self.asked_of(batch, self.teacher)[:32]
        tokens = self.student.sample(self._encode(asked), self.noise(small, "preview"))
        return self.tokenizer.under(asked).decode(tokens)

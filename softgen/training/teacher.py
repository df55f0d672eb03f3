"""Stage 2: train a teacher on the codes of a tokenizer: masked diffusion, or autoregressive."""

import sys
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from softgen.data.base import Batch, ImageDataModule
from softgen.distributed import mean_over_ranks
from softgen.loading import check_compatible, load_tokenizer
from softgen.masking import MaskLaw, draw_mask_ratio, exact_mask, mask_counts
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import LinearHead, MaskedDiffusionModel
from softgen.models.blocks import start_from_codebook
from softgen.models.conditions import Condition
from softgen.models.text import WordTextEncoder
from softgen.models.transformer import MaskedTransformer
from softgen.pretrained import Pretrained
from softgen.random import SampleRandom, derive_seed
from softgen.relaxation import DENSE_LIMIT, Distance, Impl, NeighbourTable, auto_two_tau_squared, neighbour_entropy
from softgen.sampling import AutoregressiveSampler, MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.optimization import OptimizerConfig
from softgen.training.stage import Stage, check_conditions
from softgen.training.targets import CodeTarget, HardTarget, NeighbourTarget, TableTarget, Target, check_target

VectorStart = Literal["random", "codebook", "whitened_codebook"]

_HEAD_SCALE = 4.0  # over d: logits of a fresh model then have a standard deviation of 4 / sqrt(d)
_TAU_IMAGES, _TAU_LATENTS = 256, 4096  # that the automatic 2 tau^2 is measured on
_TAU_BATCH = 8


@dataclass(frozen=True)
class _Example:
    """A tokenised batch: codes (B, N), and what to train towards."""

    tokens: Tensor
    target: CodeTarget


class TeacherTraining(Stage):
    """Cross-entropy of masked sites, predicted from the others; or, autoregressive, of each from those before it.

    Args:
        tokenizer: Folder or hub id of the tokenizer, or the tokenizer itself. Its weights stay as they are.
        model: The network, e.g. `softgen.models.MaskedTransformer`, or `softgen.models.AutoregressiveTransformer`
            (SNCE, eq. 13), which neither mask law nor weighting nor token noise concerns.
        optimizer: Settings of its parameters.
        target: `hard` codes, `label_smoothing`, or `snce`: the neighbours of the latent (arXiv SNCE, eq. 8).
        label_smoothing: For that target, in [0, 1].
        two_tau_squared: 2 tau^2 of SNCE's neighbour distribution, above 0; `auto` takes 3.5 times the median squared
            distance of training latents to their codes (of codes to the nearest other one, where only codes are
            stored).
        snce_distance: Distance of the neighbour distribution; by default the tokenizer's.
        neighbour_table: File of a `softgen.relaxation.NeighbourTable`, or the table itself: SNCE then takes z = v_r and
            the table's q, 2 tau^2 and distance, at the cost of hard targets.
        weighting: `uniform` over masked sites, or `elbo`: 1/t, for which the ratio t is uniform (SNCE, eq. 15; needs
            the law `linear`).
        mask_law: Of the mask ratio t.
        embedding_init: How a native model's token embeddings start: `random`; `codebook`, a random projection of the
            tokenizer's code vectors, which large codebooks need; or `whitened_codebook`, that of the whitened vectors.
            Where most of the codebook's variance lies in a few directions, such as the brightness of a background,
            whitening makes the others be seen. A teacher of shapes learnt faster so (.54 after 1,500 steps, not .42),
            but was no better to distil (benchmarks/results/text_to_image.md).
        head_init: How a native model's output layer starts: `random`, `codebook` or `whitened_codebook`: each code's
            row lies along the same projection, so that near codes have near logits from the first step.
        token_noise: Share of images, in [0, 1], some of whose visible tokens are those of the next image of the batch,
            any share of them. What a student draws can be all of a piece and yet not what was asked for: such a teacher
            doubts it, where others believe what they see before the condition.
        label_dropout: Share of samples trained without condition, for guidance; in [0, 1].
        preview_steps: Sampling steps of the preview.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        tokenizer: str | ImageTokenizer,
        model: MaskedDiffusionModel | AutoregressiveTransformer,
        optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, betas=(0.9, 0.96)),  # noqa: B008 - frozen
        target: Target = "hard",
        label_smoothing: float = 0.1,
        two_tau_squared: float | Literal["auto"] = "auto",
        snce_distance: Distance | None = None,
        neighbour_table: str | NeighbourTable | None = None,
        weighting: Literal["uniform", "elbo"] = "uniform",
        mask_law: MaskLaw = "arccos",
        embedding_init: VectorStart = "random",
        head_init: VectorStart = "random",
        token_noise: float = 0.0,
        label_dropout: float = 0.1,
        preview_steps: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        check_target(target, label_smoothing=label_smoothing, two_tau_squared=two_tau_squared, key="model")
        for name, share in (("token_noise", token_noise), ("label_dropout", label_dropout)):
            if not 0 <= share <= 1:
                raise ValueError(f"model.{name}: expected a number in [0, 1], got {share}")
        if weighting not in ("uniform", "elbo"):
            raise ValueError(f"model.weighting: expected uniform or elbo, got {weighting!r}")
        if weighting == "elbo" and mask_law != "linear":
            raise ValueError(f"model.mask_law: expected linear with weighting elbo, got {mask_law}")
        draw_mask_ratio(mask_law, torch.zeros(1), key="model.mask_law")
        opened = load_tokenizer(tokenizer, key="model.tokenizer") if isinstance(tokenizer, str) else tokenizer
        model.check(key="model.model")
        check_compatible(model, opened, key="model.tokenizer")
        self.hold_frozen("tokenizer", opened)
        self.model = model
        for name, start in (("embedding_init", embedding_init), ("head_init", head_init)):
            if start not in get_args(VectorStart):
                raise ValueError(f"model.{name}: expected {', '.join(get_args(VectorStart))}, got {start!r}")
            if start == "random":
                continue
            if not isinstance(model, (MaskedTransformer, AutoregressiveTransformer)):
                raise ValueError(
                    f"model.{name}: expected random for a {type(model).__name__}, whose vectors are its own, "
                    f"got {start}"
                )
            rows, scale = (
                (model.token_embedding.weight, 1.0)
                if name == "embedding_init"
                else (model.head.weight, _HEAD_SCALE / model.head.in_features)
            )
            generator = torch.Generator().manual_seed(derive_seed(seed, "embedding"))
            whitened = start == "whitened_codebook"
            start_from_codebook(rows, opened.codebook, whitened=whitened, scale=scale, generator=generator)
        self.target = target
        self.label_smoothing = label_smoothing if target == "label_smoothing" else 0.0
        self.two_tau_squared = two_tau_squared if two_tau_squared == "auto" else float(two_tau_squared)
        self.snce_distance: Distance = snce_distance or opened.distance
        self.neighbour_table = self._open_table(neighbour_table)
        self.weighting = weighting
        self.mask_law = mask_law
        self.token_noise = token_noise
        self.label_dropout = label_dropout if model.has_null_condition else 0.0
        self._said_fused = False
        self._settled = False
        if preview_steps < 1:
            raise ValueError(f"model.preview_steps: expected at least 1, got {preview_steps}")
        self.preview_steps = min(preview_steps, model.num_sites)

    @property
    def tokenizer(self) -> ImageTokenizer:
        """The frozen tokenizer."""
        tokenizer = self.frozen("tokenizer")
        assert isinstance(tokenizer, ImageTokenizer)
        return tokenizer

    @property
    def product(self) -> Pretrained:
        """The teacher."""
        return self.model

    @property
    def tokenizer_beside(self) -> ImageTokenizer:
        """The tokenizer of the codes."""
        return self.tokenizer

    def check_data(self, data: ImageDataModule) -> None:
        """Images, classes and stored tokens must be those of tokenizer and model; new text encoders learn words."""
        check_conditions(data, self.model)
        self.check_images(data, self.tokenizer)
        if self.token_noise and data.batch_size < 2:
            raise ValueError(f"data.batch_size: expected at least 2 with token_noise, got {data.batch_size}")
        encoder = self.model.text_encoder
        if isinstance(encoder, WordTextEncoder) and not encoder.vocabulary:
            encoder.learn_words(data.captions())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the words, which no weight holds."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.model.text_encoder, WordTextEncoder):
            checkpoint["vocabulary"] = list(self.model.text_encoder.vocabulary)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other words.

        Raises:
            ValueError: Naming the first word that differs.
        """
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.model.text_encoder, WordTextEncoder):
            pairs = zip_longest(checkpoint.get("vocabulary", ()), self.model.text_encoder.vocabulary)
            for expected, got in pairs:
                if expected != got:
                    raise ValueError(
                        f"model.text_encoder.vocabulary: expected the words of the checkpoint, with {expected!r}, "
                        f"got {got!r}"
                    )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Tokenise, mask, predict the masked sites."""
        example = self._tokenise(batch)
        noise = self.noise(batch, "teacher")
        condition = self._condition(batch).drop(noise.uniform() < self.label_dropout)
        return self.report(batch, {self.target: self._loss(example, condition, noise)}, {})

    def _loss(self, example: _Example, condition: Condition, noise: SampleRandom) -> Tensor:
        if isinstance(self.model, AutoregressiveTransformer):
            shape, wide = example.tokens.shape, torch.float32
            even = torch.full(shape, 1 / example.tokens.numel(), dtype=wide, device=self.device)
            return self._weighted_loss(example.tokens, condition, example, even)
        sites = self.model.num_sites
        if self.weighting == "elbo":
            counts = (noise.uniform() * sites).long() + 1  # each of 1..N as often
            mask = exact_mask(counts, noise.uniform(sites))
            weights = mask.float() * (sites / counts.float()).unsqueeze(-1) / mask.numel()
        else:
            counts = mask_counts(draw_mask_ratio(self.mask_law, noise.uniform()), sites)
            mask = exact_mask(counts, noise.uniform(sites))
            weights = mask.float() / mean_over_ranks(mask.sum())
        seen = self._with_token_noise(example.tokens, noise)
        embeddings = self.model.embed(seen.masked_fill(mask, self.model.mask_id))
        return self._weighted_loss(embeddings, condition, example, weights)

    def _with_token_noise(self, tokens: Tensor, noise: SampleRandom) -> Tensor:
        """Tokens (B, N) of which some are those of the next image."""
        if self.token_noise == 0:
            return tokens
        share = noise.uniform() * (noise.uniform() < self.token_noise)
        is_other = noise.uniform(tokens.shape[1]) < share.unsqueeze(-1)
        return torch.where(is_other, tokens.roll(-1, dims=0), tokens)

    def _weighted_loss(self, inputs: Tensor, condition: Condition, example: _Example, weights: Tensor) -> Tensor:
        """The sum over sites of weights (B, N) times the loss of the site."""
        if not isinstance(self.model, LinearHead):
            return example.target.loss(self.model(inputs, condition).flatten(0, 1), weights.flatten())
        hidden = self.model.hidden(inputs, condition).flatten(0, 1)
        impl: Impl = "fused" if self._fused(example.tokens) else "dense"
        return example.target.linear_loss(hidden, self.model.head, weights.flatten(), impl=impl)

    def _fused(self, tokens: Tensor) -> bool:
        """Whether the (tokens x codes) matrix is too large to keep; said once."""
        fused = tokens.numel() * self.model.num_codes > DENSE_LIMIT
        if fused and not self._said_fused and self.trainer.is_global_zero:
            size = f"{tokens.numel()} tokens x {self.model.num_codes} codes"
            print(f"{self.target}: {size}: the fused loss is used, which never stores that matrix", file=sys.stderr)
        self._said_fused |= fused
        return fused

    @torch.no_grad()
    def _tokenise(self, batch: Batch) -> _Example:
        latents = None if "token" in batch else self.tokenizer.latents(batch["image"])
        tokens = batch["token"] if latents is None else self.tokenizer.quantize(latents)
        if self.target != "snce":
            return _Example(tokens, HardTarget(tokens.flatten(), self.label_smoothing))
        if self.neighbour_table is not None:
            return _Example(tokens, TableTarget(tokens.flatten(), self.neighbour_table))
        assert isinstance(self.two_tau_squared, float)
        # Where only codes are stored, z = v_r.
        flat = self.tokenizer.codebook[tokens.flatten()] if latents is None else latents.flatten(0, 1)
        return _Example(
            tokens, NeighbourTarget(flat, self.tokenizer.codebook, self.two_tau_squared, self.snce_distance)
        )

    def _condition(self, batch: Batch) -> Condition:
        return self.model.encode(self.asked_of(batch, self.model))

    def on_fit_start(self) -> None:
        """Settle 2 tau^2 on the first latents where it is `auto`, and report the perplexity of q."""
        if self.target != "snce":
            return
        entropy = self._settle_tau()
        if entropy is None:
            return
        spread = entropy.exp()
        mean, median = spread.mean().item(), spread.median().item()
        if self.trainer.is_global_zero:
            tau = f"2 tau^2 = {self.two_tau_squared:.4g}"
            print(f"SNCE: {tau}, perplexity of q: median {median:.1f}, mean {mean:.1f}", file=sys.stderr)
        if mean > self.tokenizer.num_codes / 10 or median < 1.2:
            rank_zero_warn(
                f"SNCE: the neighbour distribution is extreme (mean perplexity {mean:.1f}); see two_tau_squared"
            )

    def on_validation_start(self) -> None:
        """What no fit has settled before: a checkpoint can be validated or tested alone."""
        if self.target == "snce" and not self._settled:
            self._settle_tau()

    def on_test_start(self) -> None:
        """As validation."""
        self.on_validation_start()

    @torch.no_grad()
    def _settle_tau(self) -> Tensor | None:
        """Measure 2 tau^2 on training data where it is `auto`; the entropies of q there, (n,), or None without any."""
        self._settled = True
        if self.neighbour_table is not None:
            self.neighbour_table = self.neighbour_table.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            if self.two_tau_squared != "auto":
                return None
            got = "bare loaders" if data is None else f"a {type(data).__name__}"
            raise ValueError(f"data: expected an ImageDataModule, which 2 tau^2 is measured on, got {got}")
        source = data.train_source()
        # The same images and sites on every process, and whatever the order of the data.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "two_tau_squared"))
        images = torch.randperm(len(source), generator=generator)[:_TAU_IMAGES].tolist()
        batch = move_data_to_device(source.fetch(images), self.device)
        codebook, stored = self.tokenizer.codebook, batch.get("token")
        sites = len(images) * self.tokenizer.num_sites
        chosen = torch.randperm(sites, generator=generator)[:_TAU_LATENTS].to(self.device)
        if stored is None:
            # A few at a time: large images would not fit.
            latents = torch.cat([self.tokenizer.latents(part) for part in batch["image"].split(_TAU_BATCH)])
            own, z = None, latents.flatten(0, 1)[chosen]
        else:
            own = stored.flatten()[chosen]
            z = codebook[own]
        if self.neighbour_table is not None:
            return self.neighbour_table.entropy(self.tokenizer.quantize(z.unsqueeze(0)) if own is None else own)
        if self.two_tau_squared == "auto":
            self.two_tau_squared = auto_two_tau_squared(z, codebook, distance=self.snce_distance, own_codes=own)
        return neighbour_entropy(z, codebook, two_tau_squared=self.two_tau_squared, distance=self.snce_distance)

    def _open_table(self, table: str | NeighbourTable | None) -> NeighbourTable | None:
        """Load and check the neighbour table, whose 2 tau^2 and distance then hold."""
        if table is None:
            return None
        key = "model.neighbour_table"
        if self.target != "snce":
            raise ValueError(f"{key}: expected target snce with it, got {self.target}")
        codebook = self.tokenizer.codebook
        opened = NeighbourTable.load(table, codebook=codebook, key=key) if isinstance(table, str) else table
        opened.check(codebook, key=key)
        if self.two_tau_squared not in ("auto", opened.two_tau_squared):
            raise ValueError(
                f"model.two_tau_squared: expected auto, or {opened.two_tau_squared:.4g} as the neighbour table, got "
                f"{self.two_tau_squared}"
            )
        self.two_tau_squared, self.snce_distance = opened.two_tau_squared, opened.distance
        return opened

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out loss under the same noise every time."""
        loss = self._loss(self._tokenise(batch), self._condition(batch), self.noise(batch, "validation"))
        self.report_validation(batch, {self.target: loss})

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Samples under the batch's conditions."""
        small = {**batch, "ordinal": batch["ordinal"][:32]}
        asked = self.asked_of(batch, self.model)[:32]
        condition = self.model.encode(asked)
        noise = self.noise(small, "preview")
        if isinstance(self.model, AutoregressiveTransformer):
            tokens = AutoregressiveSampler()(self.model, condition, noise)
        else:
            tokens = MaskGITSampler(steps=self.preview_steps)(self.model, condition, noise)
        return self.tokenizer.under(asked).decode(tokens)

"""SFTok (arXiv 2512.16910): a TiTok whose decoder predicts proxy codes in several steps.

Proxy codes are those of another tokenizer, one a patch; in the published ones, of MaskGIT's VQGAN. Every step predicts
all of them, keeps the surest and masks the others again; the distributions of the last step turn into the image.

Shape legend: B batch, L latent tokens, K codes, D code dimension, P proxies, V proxy codes, W width.
"""

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.categorical import UniformSource
from softgen.checkpoints import build, find_checkpoint, published_settings, read_checkpoint
from softgen.pretrained import from_config, to_config
from softgen.relaxation import expected_embedding, probabilities, widen
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.tokenizers.maskgit_vqgan import MaskGITVQGAN, PixelDecoder, check_pixel_decoder, pixel_decoder_sizes
from softgen.tokenizers.optvq import OptVQCodebook, sinkhorn_codes
from softgen.tokenizers.parts import CodeTable, as_weights, check_vit_sizes, nearest_code, without_clash
from softgen.tokenizers.sftok_decoder import Refined, SFTokDecoder
from softgen.tokenizers.titok import TiTokEncoder, free_parameter, vit_sizes

Assignment = Literal["nearest", "published"]

_BASE = {"width": 768, "depth": 12, "heads": 12, "patch_size": 16}
_STEPS, _TEMPERATURE = 8, 1.0
_LEGACY = "decoder.embedding_positional_embedding"
_PIXEL_SIZES = ("channel_mult", "hidden_channels", "num_res_blocks", "z_channels", "num_channels")


class SFTok(ImageTokenizer):
    """SFTok. The defaults are those of SFTok-B.

    Decoding draws noise where `temperature` is above 0. To be a function of the codes alone, and each image's of no
    other image, it draws the same noise for every image, from `noise_seed`; `refine` takes any.

    Args:
        image_size: Pixels a side; a multiple of both patch sizes.
        codebook_size: K.
        token_size: D.
        num_latent_tokens: L.
        use_l2_norm: Whether latents and codes are unit vectors.
        encoder: `width`, `depth`, `heads` and `patch_size` of the encoder.
        decoder: The same of the decoder.
        is_legacy: Whether the encoder's output is scrambled, as in every published one; see `TiTokEncoder`.
        proxy_codebook_size: V.
        pixel_decoder: Arguments of `PixelDecoder`, as in the published ones; or a `ConvVQTokenizer`, whose decoder and
            codes are copied; None for checkpoints of the first two stages of training, which predict proxy codes and no
            image.
        eval: How codes are assigned in eval mode. `nearest`: each latent's nearest. `published`: by optimal transport
            over all latents of the batch, as in training; an image's codes then depend on the images beside it.
        steps: Of the decoder, in 1..P.
        temperature: T: Gumbel noise on proxies and on confidence is scaled by T (1 - r), r the share of steps done.
        anneal: Divide the decoder's logits by 0.5 + 0.8 (1 - r), at the last step too.
        noise_seed: Of the noise.

    Raises:
        ValueError: If sizes do not fit each other, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 8192,
        token_size: int = 32,
        num_latent_tokens: int = 64,
        use_l2_norm: bool = True,
        encoder: Mapping[str, int] | None = None,
        decoder: Mapping[str, int] | None = None,
        is_legacy: bool = True,
        proxy_codebook_size: int = 1024,
        pixel_decoder: ConvVQTokenizer | Mapping[str, Any] | None = None,
        eval: Assignment = "nearest",
        steps: int = _STEPS,
        temperature: float = _TEMPERATURE,
        anneal: bool = False,
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"encoder": {**_BASE, **(encoder or {})}, "decoder": {**_BASE, **(decoder or {})}}
        check_vit_sizes(
            sizes,
            image_size=image_size,
            codebook_size=codebook_size,
            token_size=token_size,
            num_latent_tokens=num_latent_tokens,
            proxy_codebook_size=proxy_codebook_size,
        )
        if eval not in get_args(Assignment):
            raise ValueError(f"tokenizer.eval: expected one of {', '.join(get_args(Assignment))}, got {eval!r}")
        if isinstance(pixel_decoder, Mapping) and "class_path" in pixel_decoder:
            pixel_decoder = _conv_vq(pixel_decoder)
        self.config = {
            "image_size": image_size,
            "codebook_size": codebook_size,
            "token_size": token_size,
            "num_latent_tokens": num_latent_tokens,
            "use_l2_norm": use_l2_norm,
            **sizes,
            "is_legacy": is_legacy,
            "proxy_codebook_size": proxy_codebook_size,
            "pixel_decoder": None if pixel_decoder is None else _described(pixel_decoder),
            "eval": eval,
            "steps": steps,
            "temperature": temperature,
            "anneal": anneal,
            "noise_seed": noise_seed,
        }
        self.image_size, self.num_codes, self.code_dim = image_size, codebook_size, token_size
        self.num_sites, self.use_l2_norm, self.distance = num_latent_tokens, use_l2_norm, "l2"
        self.assignment, self.steps, self.temperature, self.noise_seed = eval, steps, temperature, noise_seed
        self.anneal = anneal
        common = {"image_size": image_size, "latent_tokens": num_latent_tokens, "token_size": token_size}
        width = sizes["encoder"]["width"]
        self.latent_tokens = free_parameter(num_latent_tokens, width, width=width)
        self.encoder = TiTokEncoder(**common, **sizes["encoder"], scrambles=is_legacy)
        self.decoder = SFTokDecoder(**common, **sizes["decoder"], proxy_codes=proxy_codebook_size)
        self.decoder.check_steps(steps, temperature, key="tokenizer.")
        self.quantizer = OptVQCodebook(num_codes=codebook_size, code_dim=token_size, use_l2_norm=use_l2_norm)
        if isinstance(pixel_decoder, ConvVQTokenizer):
            self.check_proxies(pixel_decoder, key="tokenizer.pixel_decoder")
            self.pixel_quantize = CodeTable(proxy_codebook_size, pixel_decoder.code_dim)
            self.pixel_quantize.embedding.weight = nn.Parameter(pixel_decoder.codebook.clone())
            self.pixel_decoder: nn.Module = copy.deepcopy(pixel_decoder.decoder)
        elif pixel_decoder is not None:
            check_pixel_decoder(pixel_decoder, patch_size=sizes["decoder"]["patch_size"])
            self.pixel_quantize = CodeTable(proxy_codebook_size, pixel_decoder["z_channels"])
            self.pixel_decoder = PixelDecoder(**pixel_decoder)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        use_l2_norm: bool | None = None,
        is_legacy: bool | None = None,
        encoder_heads: int | None = None,
        decoder_heads: int | None = None,
        eval: Assignment = "nearest",
        steps: int | None = None,
        temperature: float | None = None,
        anneal: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SFTok":
        """Open a published checkpoint of any size and stage.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`.
            key: The config key that named it, for error messages.
            use_l2_norm: Shapes do not tell it; by default what config.json beside the checkpoint says, else True.
            is_legacy: As `use_l2_norm`.
            encoder_heads: Shapes do not tell them; by default the published 64 channels a head.
            decoder_heads: As `encoder_heads`.
            eval: See the class.
            steps: Of the decoder; by default what config.json beside the checkpoint says, else the published 8.
            temperature: As `steps`; the published one is 1.
            anneal: As `steps`; the published ones do not.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key)
        state = without_clash(read_checkpoint(path, key=key))
        if _LEGACY in state:
            state["decoder.learnable_embedding_positional_embedding"] = state.pop(_LEGACY)
        arguments = _sizes(state, encoder_heads=encoder_heads, decoder_heads=decoder_heads, key=key)
        codes = published_settings(path, "vq_model")
        told = published_settings(path, "decoder", "generator")  # in either of them
        arguments |= {
            "use_l2_norm": codes.get("use_l2_norm", True) if use_l2_norm is None else use_l2_norm,
            "is_legacy": codes.get("is_legacy", True) if is_legacy is None else is_legacy,
            "eval": eval,
            "steps": told.get("num_steps", _STEPS) if steps is None else steps,
            "temperature": told.get("randomize_temperature", _TEMPERATURE) if temperature is None else temperature,
            "anneal": told.get("softmax_temperature_annealing", False) if anneal is None else anneal,
        }
        return build(cls, arguments, state, key=key, dropped=("quantizer.index_offset",), dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (K, D), unit vectors where `use_l2_norm`."""
        return self.quantizer.codes

    @property
    def untrained(self) -> bool:
        """Whether no step of training has moved its codes."""
        linear = self.quantizer.shared_linear
        return torch.equal(linear.weight, torch.eye(self.code_dim).to(linear.weight)) and not linear.bias.any()

    def codebook_weight(self) -> Tensor:
        """See the base class: before the linear map and the norm."""
        return self.quantizer.embedding

    def raw_latents(self, images: Tensor) -> Tensor:
        """Encoder outputs (B, L, D) before they are normalised."""
        self.check_images(images)
        encoded: Tensor = self.encoder(as_weights(images, self.encoder), self.latent_tokens)
        return encoded

    def latents(self, images: Tensor) -> Tensor:
        """See the base class; unit vectors where `use_l2_norm`, float32."""
        wide = widen(self.raw_latents(images))
        return F.normalize(wide, dim=-1) if self.use_l2_norm else wide

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; the nearest in eval mode unless it was built with `eval: published`."""
        return self.assign(latents, transport=self.training or self.assignment == "published")

    def assign(self, latents: Tensor, *, transport: bool) -> Tensor:
        """Codes (B, L) of latents (B, L, D), by transport over all of them or the nearest of each."""
        if not transport:
            return nearest_code(latents, self.codebook)
        return sinkhorn_codes(latents.flatten(0, 1), self.codebook).view(latents.shape[:2])

    def with_pixels(self, proxies: ImageTokenizer, *, key: str = "proxies") -> "SFTok":
        """A copy whose pixel decoder is that of the tokenizer of the proxy codes, as fine-tuning starts.

        Args:
            proxies: That tokenizer; MaskGIT's VQGAN in the published ones.
            key: The config key that named it, for error messages.

        Raises:
            ValueError: If its codes or its grid are not those of the proxies, or it is of another class.
        """
        if not isinstance(proxies, (ConvVQTokenizer, MaskGITVQGAN)):
            raise ValueError(
                f"{key}: expected a ConvVQTokenizer or a MaskGITVQGAN to take the pixel decoder from, got a "
                f"{type(proxies).__name__}"
            )
        self.check_proxies(proxies, key=key)
        copied = SFTok(**{**self.config, "pixel_decoder": _described(proxies)})
        pixels = {f"pixel_decoder.{name}": value for name, value in proxies.decoder.state_dict().items()}
        pixels["pixel_quantize.embedding.weight"] = proxies.codebook
        copied.load_state_dict({**self.state_dict(), **pixels})
        return copied.to(self.latent_tokens.device)

    def check_proxies(self, proxies: ImageTokenizer, *, key: str) -> None:
        """Refuse another tokenizer than one whose codes can be the proxies.

        Raises:
            ValueError: Naming what of it differs: its number of codes or of sites, or the size of its images.
        """
        decoder = self.decoder
        expected = {"num_codes": decoder.num_codes, "num_sites": decoder.num_proxies, "image_size": self.image_size}
        for name, value in expected.items():
            if (got := getattr(proxies, name)) != value:
                raise ValueError(f"{key}.{name}: expected {value} as the tokenizer's proxies have, got {got}")

    def refine(
        self,
        embeddings: Tensor,
        noise: UniformSource | None = None,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        anneal: bool | None = None,
    ) -> Refined:
        """Predict the proxies of code vectors in several steps; see `SFTokDecoder.refine`.

        Args:
            embeddings: Code vectors (B, L, D).
            noise: By default the same for every image, from `noise_seed`.
            steps: By default the tokenizer's.
            temperature: By default the tokenizer's.
            anneal: By default the tokenizer's.

        Raises:
            ValueError: If steps or temperature are out of range, or the code vectors have another shape.
        """
        steps_of = self.predictions(embeddings, noise, steps=steps, temperature=temperature, anneal=anneal)
        return deque(steps_of, maxlen=1).pop()

    def predictions(
        self,
        embeddings: Tensor,
        noise: UniformSource | None = None,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        anneal: bool | None = None,
    ) -> Iterator[Refined]:
        """What each step of `refine` predicts of all proxies; arguments and errors as there."""
        if embeddings.shape[1:] != (self.num_sites, self.code_dim):
            expected = f"(B, {self.num_sites}, {self.code_dim})"
            raise ValueError(f"embeddings: expected shape {expected}, got {tuple(embeddings.shape)}")
        return self.decoder.predictions(
            embeddings,
            _SameForAll(self.noise_seed, like=embeddings) if noise is None else noise,
            steps=self.steps if steps is None else steps,
            temperature=self.temperature if temperature is None else temperature,
            anneal=self.anneal if anneal is None else anneal,
        )

    def pixels(self, proxy_logits: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [0, 1], of the expected proxy codes under logits (B, P, V).

        Raises:
            ValueError: If the model has no pixel decoder.
        """
        if self.config["pixel_decoder"] is None:
            raise ValueError(
                "tokenizer: expected an SFTok with a pixel decoder, got one of the first two stages, whose proxy codes "
                "(refine) MaskGIT's VQGAN decodes"
            )
        expected = expected_embedding(probabilities(proxy_logits), self.pixel_quantize.embedding.weight)
        grid = expected.transpose(1, 2).reshape(len(expected), -1, self.decoder.grid, self.decoder.grid)
        images: Tensor = self.pixel_decoder(grid)
        return images

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Images from code vectors before they are clamped to [0, 1]."""
        return self.pixels(self.refine(embeddings).logits)

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return self.decode_raw(embeddings).clamp(0, 1)


def _described(pixel_decoder: ConvVQTokenizer | MaskGITVQGAN | Mapping[str, Any]) -> dict[str, Any]:
    """A pixel decoder in a config: MaskGIT's by its arguments alone, as published."""
    if isinstance(pixel_decoder, ConvVQTokenizer):
        return to_config(pixel_decoder)
    if isinstance(pixel_decoder, MaskGITVQGAN):
        return {name: pixel_decoder.config[name] for name in _PIXEL_SIZES}
    return dict(pixel_decoder)


def _conv_vq(config: Mapping[str, Any]) -> ConvVQTokenizer:
    built = from_config(config, key="tokenizer.pixel_decoder")
    if not isinstance(built, ConvVQTokenizer):
        raise ValueError(f"tokenizer.pixel_decoder: expected a ConvVQTokenizer, got a {type(built).__name__}")
    return built


class _SameForAll:
    """Uniform draws from a seed, the same for every sample of a batch."""

    def __init__(self, seed: int, *, like: Tensor) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._like = like

    def uniform(self, *shape: int) -> Tensor:
        draws = torch.rand(1, *shape, generator=self._generator, dtype=torch.float32).to(self._like.device)
        return draws.expand(len(self._like), *shape)


def _sizes(
    state: Mapping[str, Tensor], *, encoder_heads: int | None, decoder_heads: int | None, key: str
) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    positions = "decoder.learnable_embedding_positional_embedding"
    needed = ("encoder.patch_embed.weight", "encoder.positional_embedding", positions, "decoder.ffn.2.weight")
    if not all(name in state for name in (*needed, "quantizer.embedding", "latent_tokens", "decoder.ln_pre.weight")):
        return {}
    groups, codes, dim = state["quantizer.embedding"].shape
    if groups != 1:
        raise ValueError(f"{key}.num_group: expected 1 as in every published SFTok, got {groups}")
    patch = state["encoder.patch_embed.weight"].shape[-1]
    image_size = patch * math.isqrt(state["encoder.positional_embedding"].shape[0] - 1)
    decoder_patch = image_size // math.isqrt(state[positions].shape[0] - 1)
    return {
        "image_size": image_size,
        "codebook_size": codes,
        "token_size": dim,
        "num_latent_tokens": state["latent_tokens"].shape[0],
        "encoder": vit_sizes(state, "encoder.", heads=encoder_heads, patch_size=patch),
        "decoder": vit_sizes(state, "decoder.", heads=decoder_heads, patch_size=decoder_patch),
        "proxy_codebook_size": state["decoder.ffn.2.weight"].shape[0],
        "pixel_decoder": pixel_decoder_sizes(state, prefix="pixel_decoder.") or None,
    }

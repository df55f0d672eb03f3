"""MaskBit's tokenizer: an image as numbers of K bits, without a table (lookup-free; arXiv 2409.16211).

Shape legend: B batch, L tokens, G groups a token, N = L G sites, K bits a token, C = 2^(K / G) codes a site.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softgen.bits import check_groups, code_bits, combine_ids, ids_of_bits, split_ids
from softgen.categorical import check_token_range
from softgen.checkpoints import build, read_checkpoint
from softgen.tokenizers.vqgan_plus import ConvAutoencoder, autoencoder_sizes, merge_options

_WIDTHS = (10, 12, 14, 16, 18)
_FILES = ("model.safetensors", "pytorch_model.bin", *(f"maskbit_tokenizer_{bits}bit.bin" for bits in _WIDTHS))
_BUFFERS = ("quantize.bits_to_indices", "quantize.codebook")


class MaskBitTokenizer(ConvAutoencoder):
    """Lookup-free: bit j of a token says whether channel j of the latent is above 0.

    Its sites are those of the `MaskBit` model: each token is G groups of bits, and the codebook is that of one group,
    the rows of -1 and 1 that its C codes stand for. The channels of a token's groups, one after the other, are the
    latent: embeddings (B, N, K / G) and (B, L, K) hold the same numbers in the same order, and `decode_embeddings`
    takes either. Squared distances add up over groups, so that the nearest code of every group is that of the token.

    The defaults are those of the published 14-bit checkpoint. Of 18 bits one never changes in the published one.

    Args:
        image_size: As the arguments not named here, one of `ConvAutoencoder`.
        bits: K.
        codebook_splits: G, a divisor of K; that of the model.

    Raises:
        ValueError: If the groups do not divide the bits, or as `ConvAutoencoder`.
    """

    codes: Tensor

    def __init__(
        self,
        *,
        image_size: int = 256,
        bits: int = 14,
        codebook_splits: int = 2,
        hidden_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_res_blocks_decoder: int | None = None,
        sample_with_conv: bool = True,
        legacy_decoder: bool = False,
    ) -> None:
        group_bits = check_groups(bits, codebook_splits, key="tokenizer")
        super().__init__(
            image_size=image_size,
            token_size=bits,
            hidden_channels=hidden_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            num_res_blocks_decoder=num_res_blocks_decoder,
            sample_with_conv=sample_with_conv,
            legacy_decoder=legacy_decoder,
        )
        self.config |= {"bits": bits, "codebook_splits": codebook_splits}
        self.bits, self.splits = bits, codebook_splits
        self.num_sites, self.num_codes, self.code_dim = self.grid**2 * codebook_splits, 2**group_bits, group_bits
        self.register_buffer("codes", code_bits(group_bits), persistent=False)

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, *, key: str = "tokenizer", dtype: torch.dtype | None = None, **options: Any
    ) -> "MaskBitTokenizer":
        """Open a published checkpoint; its sizes are read from it.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`, `pytorch_model.bin` or
                `maskbit_tokenizer_10bit.bin` (or 12 to 18).
            key: The config key that named it, for error messages.
            dtype: Of the weights; None keeps the checkpoint's.
            **options: Arguments of the class. `image_size` (256) and `codebook_splits` (2) show in no shape; those that
                do are checked against the checkpoint.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        state = read_checkpoint(source, key=key, names=_FILES)
        arguments = autoencoder_sizes(state)
        if "token_size" in arguments:
            arguments["bits"] = arguments.pop("token_size")
            _check_buffers(state, arguments["bits"], key=key)
        arguments = merge_options(arguments, options, key=key)
        return build(cls, arguments, state, key=key, dropped=_BUFFERS, dtype=dtype)

    def restore_buffers(self) -> None:
        """The bits of the codes."""
        self.codes = code_bits(self.code_dim).to(self.encoder.conv_out.weight)

    @property
    def codebook(self) -> Tensor:
        """The bits of a group's codes, -1 and 1: (C, K / G)."""
        return self.codes

    def latents(self, images: Tensor) -> Tensor:
        """See the base class: (B, N, K / G)."""
        return self.encode_raw(images).reshape(len(images), self.num_sites, self.code_dim)

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class: the signs; exactly 0 counts as -1."""
        return ids_of_bits(latents)

    def split(self, ids: Tensor) -> Tensor:
        """The codes (B, N) in [0, C) of tokens as numbers (B, L) in [0, 2^K), as published token files hold them.

        Raises:
            ValueError: If a number is out of range.
        """
        check_token_range(ids, 2**self.bits - 1)
        return split_ids(ids, bits=self.bits, groups=self.splits).flatten(-2)

    def combine(self, tokens: Tensor) -> Tensor:
        """Tokens as numbers (B, L) in [0, 2^K) of their groups' codes (B, N); the inverse of `split`.

        Raises:
            ValueError: If a code is out of range, such as a mask.
        """
        check_token_range(tokens, self.num_codes - 1)
        return combine_ids(tokens.reshape(len(tokens), -1, self.splits), bits=self.bits)


def _check_buffers(state: Mapping[str, Tensor], bits: int, *, key: str) -> None:
    """Refuse bits in another order: the images would be noise."""
    expected = {"quantize.bits_to_indices": 2 ** torch.arange(bits), "quantize.codebook": code_bits(bits)}
    for name in _BUFFERS:
        if name in state and not torch.equal(state[name].to(expected[name].dtype), expected[name]):
            raise ValueError(f"{key}.{name}: expected the {bits} bits of each code from the lowest up, got others")

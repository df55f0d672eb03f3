"""SNCE from stored codes alone: the neighbours of every code, computed once.

Where a data set keeps codes and not latents, z = v_r is one of K vectors, and so is its q. The table keeps the k
likeliest codes of each with their weights.

Shape legend: N tokens, K codes, k neighbours, d width of hidden states, D code dimension.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from softgen.files import save_tensors
from softgen.relaxation.codebook_attention import check_head
from softgen.relaxation.neighbour_loss import Reduction
from softgen.relaxation.neighbours import Distance, NeighbourScores, check_neighbours
from softgen.relaxation.precision import full_precision, widen
from softgen.relaxation.sparse_loss import check_tokens, sparse_cross_entropy
from softgen.relaxation.streaming import DENSE_LIMIT, Impl, check_blocks, score_tile, wide_dtype

_WANTED_MASS = 0.99


@dataclass(frozen=True, eq=False)
class NeighbourTable:
    """The k likeliest codes of q(v_r) for every code r, with q renormalised over them.

    A k of 4 times the perplexity of q keeps 99 % of its mass on evenly spaced codes; heavy-tailed codebooks need more,
    and in many dimensions q may be too flat to be cut at all.

    Attributes:
        codes: (K, k) int32, likeliest first.
        weights: (K, k) float32, each row sums to 1.
        kept_mass: Share of q that the k codes held before renormalising, (K,) float32 in (0, 1].
        two_tau_squared: 2 tau^2 of q, above 0.
        distance: Of q.
        codebook_hash: `codebook_hash` of the codebook.
    """

    codes: Tensor
    weights: Tensor
    kept_mass: Tensor
    two_tau_squared: float
    distance: Distance
    codebook_hash: str

    @classmethod
    def build(
        cls,
        codebook: Tensor,
        *,
        two_tau_squared: float,
        distance: Distance = "l2",
        neighbours: int = 64,
        token_block: int | None = None,
    ) -> "NeighbourTable":
        """Compute the table, a block of rows at a time; one product of the codebook with itself in all.

        Args:
            codebook: Code vectors, shape (K, D).
            two_tau_squared: 2 tau^2, in the units of the distance; above 0.
            distance: As in `neighbour_cross_entropy`.
            neighbours: k, at least 1; no more than K are kept.
            token_block: Rows of q that exist at a time; chosen from K if None.

        Returns:
            The table, on the codebook's device.

        Raises:
            ValueError: If an argument is out of its range.

        Warns:
            UserWarning: If less than 0.99 of the mass is kept, on average over codes.
        """
        check_neighbours(codebook, codebook, two_tau_squared=two_tau_squared, distance=distance)
        check_blocks(token_block, None)
        if neighbours < 1:
            raise ValueError(f"neighbours: expected at least 1, got {neighbours}")
        size = codebook.shape[0]
        vectors = codebook.detach()
        scores = NeighbourScores(
            vectors, vectors, two_tau_squared=two_tau_squared, distance=distance, dtype=wide_dtype(codebook)
        )
        keys, offset = scores.keys(slice(None))
        found = []
        with torch.no_grad(), full_precision(codebook):
            for queries in torch.split(scores.queries, token_block or max(64, DENSE_LIMIT // size)):
                q = score_tile(queries, keys, offset).softmax(dim=-1)
                values, codes = q.topk(min(neighbours, size))
                found.append((codes.int(), values.float(), values.sum(dim=-1).float()))
        codes, weights, kept_mass = (torch.cat(parts) for parts in zip(*found, strict=True))
        table = cls(
            codes=codes,
            weights=weights / weights.sum(dim=-1, keepdim=True),
            kept_mass=kept_mass,
            two_tau_squared=two_tau_squared,
            distance=distance,
            codebook_hash=codebook_hash(codebook),
        )
        table._warn()
        return table

    def cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
        reduction: Reduction = "mean",
        subtract_entropy: bool = False,
        impl: Impl = "auto",
        token_block: int | None = None,
        code_block: int | None = None,
    ) -> Tensor:
        """`neighbour_cross_entropy` for z = v_r, with the table's q.

        Only the logsumexp sees all codes; the rest gathers k rows of the head a token.

        Args:
            hidden: Hidden states before the head, shape (N, d); N may be 0.
            weight: The head, shape (K, d).
            tokens: The codes r, shape (N,) int64 in [0, K).
            bias: Of the head, shape (K,). -inf forbids a code: it has no part in p nor in q; where it forbids all that
                the table keeps of a token, r itself among them, the result is NaN.
            token_weights: As in `neighbour_cross_entropy`.
            reduction: As in `neighbour_cross_entropy`.
            subtract_entropy: As in `neighbour_cross_entropy`.
            impl: As in `neighbour_cross_entropy`.
            token_block: Tokens a tile of the fused path; chosen from the shapes if None.
            code_block: Codes a tile of the fused path; chosen from the shapes if None.

        Returns:
            A scalar, or (N,) for `none`; float32 (float64 where an input is).

        Raises:
            ValueError: If shapes disagree, or a choice is unknown.
        """
        check_head(hidden, weight, bias)
        check_tokens(tokens, hidden)
        if weight.shape[0] != self.codes.shape[0]:
            raise ValueError(f"weight: expected {self.codes.shape[0]} codes as the table, got {weight.shape[0]}")
        return sparse_cross_entropy(
            hidden,
            weight,
            *self._targets(tokens, bias, wide_dtype(hidden, weight)),
            bias=bias,
            token_weights=token_weights,
            reduction=reduction,
            subtract_entropy=subtract_entropy,
            impl=impl,
            token_block=token_block,
            code_block=code_block,
        )

    def entropy(self, tokens: Tensor) -> Tensor:
        """Entropy of q(v_r) over the codes kept, in nats, for tokens r of any shape; the same shape, float32."""
        entropy: Tensor = torch.special.entr(self.weights).sum(dim=-1)
        return entropy[tokens]

    def _targets(self, tokens: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes (N, k) int64 and their weights (N, k), without the codes that the bias forbids."""
        codes, q = self.codes[tokens].long(), self.weights[tokens].to(dtype)
        if bias is not None:
            q = q * (bias.detach()[codes] != -torch.inf)
            q = q / q.sum(dim=-1, keepdim=True)
        return codes, q

    def to(self, device: torch.device | str) -> "NeighbourTable":
        """The same table on another device."""
        return NeighbourTable(
            codes=self.codes.to(device),
            weights=self.weights.to(device),
            kept_mass=self.kept_mass.to(device),
            two_tau_squared=self.two_tau_squared,
            distance=self.distance,
            codebook_hash=self.codebook_hash,
        )

    def check(self, codebook: Tensor, *, key: str = "neighbour_table") -> None:
        """Refuse another codebook than the table was made for.

        Raises:
            ValueError: Naming both hashes.
        """
        got = codebook_hash(codebook)
        if got != self.codebook_hash:
            raise ValueError(f"{key}: expected a table of the codebook {got}, got one of {self.codebook_hash}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, by renaming a finished one."""
        tensors = {"codes": self.codes, "weights": self.weights, "kept_mass": self.kept_mass}
        tensors["two_tau_squared"] = torch.tensor(self.two_tau_squared, dtype=torch.float64)
        tensors["distance"] = _to_bytes(self.distance)
        tensors["codebook_hash"] = _to_bytes(self.codebook_hash)
        save_tensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | Path, *, codebook: Tensor, key: str = "neighbour_table") -> "NeighbourTable":
        """Read what `save` wrote.

        Args:
            path: The file.
            codebook: The codebook that the table must have been made for, shape (K, D).
            key: The config key that named the file, for error messages.

        Returns:
            The table, on the codebook's device.

        Raises:
            ValueError: If the file is missing or something else, or the table was made for another codebook.

        Warns:
            UserWarning: As `build`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            name = _from_bytes(tensors["distance"])
            table = cls(
                codes=tensors["codes"],
                weights=tensors["weights"],
                kept_mass=tensors["kept_mass"],
                two_tau_squared=tensors["two_tau_squared"].item(),
                distance=next(distance for distance in get_args(Distance) if distance == name),
                codebook_hash=_from_bytes(tensors["codebook_hash"]),
            )
        except (OSError, KeyError, StopIteration, SafetensorError) as error:
            raise ValueError(f"{key}: expected a file of a neighbour table, got '{path}' ({error})") from error
        table.check(codebook, key=key)
        table._warn()
        return table.to(codebook.device)

    def _warn(self) -> None:
        mean, least = self.kept_mass.mean().item(), self.kept_mass.min().item()
        if mean < _WANTED_MASS:
            warnings.warn(
                f"neighbour table: {self.codes.shape[1]} neighbours keep {mean:.3f} of the mass of q on average "
                f"(least {least:.3f}), under {_WANTED_MASS}: more neighbours, or a smaller two_tau_squared, keep more",
                stacklevel=3,
            )


def codebook_hash(codebook: Tensor) -> str:
    """A short hash of the shape and values of a codebook (K, D), widened to float32 at least."""
    digest = hashlib.blake2b(str(tuple(codebook.shape)).encode(), digest_size=8)
    digest.update(widen(codebook.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()

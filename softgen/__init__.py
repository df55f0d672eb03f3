"""softgen: one-step discrete image generators by Di[M]O and Soft-Di[M]O."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softgen.loading import load_generator, load_model, load_tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "load_generator", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> object:
    # Lazy: `import softgen` alone stays free of torch.
    if name in __all__:
        from softgen import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'softgen' has no attribute {name!r}")

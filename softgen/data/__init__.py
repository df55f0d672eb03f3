"""Data modules: what images, labels or tokens a run sees, and in which order."""

from softgen.data.base import (
    Batch,
    ImageDataModule,
    OrdinalBatches,
    OrdinalStream,
    SampleSource,
    StreamLoader,
    TrainVal,
)
from softgen.data.batches import source_batches
from softgen.data.digits import Digits
from softgen.data.fashion_mnist import FashionMNIST
from softgen.data.image_folder import ImageFolder
from softgen.data.labels import Labels
from softgen.data.memory import TensorSource
from softgen.data.openmoji import OpenMoji
from softgen.data.prompts import Prompts
from softgen.data.scenes import ShapesPrompt, description_of, shapes_prompts, shapes_vocabulary
from softgen.data.shapes import Shapes
from softgen.data.token_cache import TokenCache, write_token_cache

__all__ = [
    "Batch",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "Labels",
    "OpenMoji",
    "OrdinalBatches",
    "OrdinalStream",
    "Prompts",
    "SampleSource",
    "Shapes",
    "ShapesPrompt",
    "StreamLoader",
    "TensorSource",
    "TokenCache",
    "TrainVal",
    "description_of",
    "shapes_prompts",
    "shapes_vocabulary",
    "source_batches",
    "write_token_cache",
]

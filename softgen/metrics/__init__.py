"""Metrics of generated images, on the features of any extractor."""

from softgen.metrics.accuracy import ClassAccuracy, class_accuracy, class_log_probability
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.classifier_training import ClassifierResult, classifier_accuracy, train_classifier
from softgen.metrics.entropy_score import EntropyScore, entropy_score
from softgen.metrics.features import (
    FeatureExtractor,
    ImageFeatures,
    count_name,
    extract_features,
    metric_name,
)
from softgen.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
from softgen.metrics.image_quality import ImageQuality, image_quality
from softgen.metrics.linear_probe import LinearProbe, linear_probe
from softgen.metrics.precision_recall import PrecisionRecall, PrecisionRecallMetric, precision_recall
from softgen.metrics.shape_detection import detect_shapes
from softgen.metrics.shapes_geneval import ShapesGenEval, shapes_correct

__all__ = [
    "ClassAccuracy",
    "ClassifierResult",
    "EntropyScore",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "ImageFeatures",
    "ImageQuality",
    "LinearProbe",
    "PrecisionRecall",
    "PrecisionRecallMetric",
    "ShapesGenEval",
    "SmallClassifier",
    "class_accuracy",
    "class_log_probability",
    "classifier_accuracy",
    "count_name",
    "detect_shapes",
    "entropy_score",
    "extract_features",
    "frechet_distance",
    "image_quality",
    "linear_probe",
    "metric_name",
    "precision_recall",
    "shapes_correct",
    "train_classifier",
]

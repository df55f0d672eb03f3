"""The quickstart's report: what its table and its sections say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.protocol import Protocol
from softgen.recipes import Recipe
from softgen.report import Figure, Section, TableRow, write_report


@dataclass(frozen=True)
class Row:
    """One line of metrics.json.

    Attributes:
        name: Of the row.
        fd: Frechet distance that the protocol names.
        n: Images that were scored.
        accuracy: Share that the protocol's classifier sees as the class asked for.
        precision: Share that looks real.
        recall: Share of the real images that is covered.
        reward: Mean log-probability of the class asked for under the judge, another classifier than the protocol's.
        seconds: Wall time of sampling (for the tokenizer, of its round trip).
    """

    name: str
    fd: float
    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    reward: float
    seconds: float


@dataclass
class Run:
    """What a quickstart gathers as it goes."""

    recipe: Recipe
    out: Path
    seed: int
    protocol: Protocol
    judge: SmallClassifier
    rows: list[Row] = field(default_factory=list)
    shown: dict[str, Tensor] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)

    def folder(self, stage: str) -> Path:
        """The run folder of a stage."""
        return self.out / stage

    def model(self, stage: str) -> str:
        """What a stage left for the next."""
        return str(self.folder(stage) / "model")


@dataclass(frozen=True)
class _Stage:
    """A section of the page.

    Attributes:
        title: Heading.
        purpose: What the stage is for.
        shown: Row -> caption of its picture.
        curves: Column of the logs -> label.
    """

    title: str
    purpose: str
    shown: Mapping[str, str]
    curves: Mapping[str, str]


_MEANING = {
    "tokenizer": "real images, encoded and decoded: the floor of every row below",
    "teacher_1": "the teacher, one pass: what the student has to beat",
    "teacher_4": "the teacher, 4 passes",
    "teacher_8": "the teacher, 8 passes",
    "teacher_16": "the teacher, 16 passes",
    "dimo": "the student of Di[M]O, one pass",
    "dimo_gan": "the same student after the GAN, one pass",
    "dimo_reward": "the same student after the reward, one pass",
    "tteo": "the GAN's student, its input embeddings optimised for the reward",
}


def write_page(run: Run, *, name: str, guidance: float, wall: float) -> None:
    """Write report.html.

    Args:
        run: What was gathered.
        name: Of the Frechet distance.
        guidance: Of the teacher.
        wall: Seconds that the whole run took.
    """
    n = next(row.n for row in run.rows if row.name == "dimo")
    write_report(
        run.out / "report.html",
        title=f"softgen quickstart: {run.recipe.name}",
        lead="From real images to a generator that draws an image in one pass, and three ways to refine it.",
        header=("", name, "class accuracy", "precision", "recall", "reward", "seconds to sample", "what it is"),
        rows=[_table_row(row) for row in run.rows],
        notes=(
            f"{name}: Frechet distance between {n:,} images and the real training images, on the features of a small "
            f"classifier (right on {run.protocol.accuracy:.1%} of held-out images; trained by this run with a fixed "
            "seed). Lower is better. Never compare it with an FID. Reward: mean log-probability of the class asked "
            "for, under another classifier, which the reward stage and TTEO climb; 0 is best.",
            "The GAN and the reward stage both go on from Di[M]O's student. They train it for more steps, so that a "
            "better row is not yet the merit of its objective: benchmarks/soft_dimo.py has the controls.",
            f"Seed {run.seed}; guidance {guidance:g} for the teacher in every row, as the student was distilled with "
            f"it; {wall:.0f} s in all. Command: python -m softgen.quickstart --data {run.recipe.name} "
            f"--seed {run.seed}",
        ),
        sections=[
            _section(run, stage, content) for stage, content in _stages(run.rows).items() if stage in run.stage_seconds
        ],
    )


def _table_row(row: Row) -> TableRow:
    numbers = [f"{value:.3f}" if value is not None else "" for value in (row.accuracy, row.precision, row.recall)]
    reward = f"{row.reward:.4f}"
    cells = (row.name, f"{row.fd:.2f}", *numbers, reward, f"{row.seconds:.2f}", _MEANING.get(row.name, ""))
    return TableRow(cells=cells, highlight=row.name == "dimo")


def _section(run: Run, stage: str, content: _Stage) -> Section:
    figures = [Figure(images=run.shown[name], caption=caption) for name, caption in content.shown.items()]
    logs = sorted((run.folder(stage) / "logs").glob("version_*/metrics.csv"))
    return Section(content.title, content.purpose, run.stage_seconds.get(stage), figures, content.curves, logs)


def _stages(rows: Sequence[Row]) -> dict[str, _Stage]:
    best = min(
        (row for row in rows if row.name in ("teacher_4", "teacher_8", "teacher_16")),
        key=lambda row: row.fd,
    )
    return {
        "1_tokenizer": _Stage(
            "1. Tokenizer",
            "Turns an image into a few codes out of a codebook, and back. Everything later happens in codes, and no "
            "generator can be better than what the tokenizer brings back.",
            {"real": "Real images.", "tokenizer": "The same, through the tokenizer."},
            {"train/mse": "squared error"},
        ),
        "2_teacher": _Stage(
            "2. Teacher",
            "A masked diffusion model learns to fill in masked codes from the visible ones. Sampling starts from masks "
            "alone and fills them in over several passes: good, but slow.",
            {
                "teacher_1": "One pass: the codes do not know of each other.",
                best.name: f"{best.name.removeprefix('teacher_')} passes, its best here.",
            },
            {"train/hard": "cross-entropy of masked codes"},
        ),
        "3_dimo": _Stage(
            "3. Di[M]O",
            "Distils the teacher into one pass: the student's codes are masked again, and its logits move until "
            "teacher and auxiliary model agree on what was there. It needs no images.",
            {"dimo": "The student: one pass."},
            {
                "train/dimo_divergence_per_site": "divergence a masked site",
                "train/dimo_critic": "auxiliary's cross-entropy",
            },
        ),
        "4_gan": _Stage(
            "4. GAN",
            "Sampled codes stop gradients; their expected embedding, softmax(z) E, lets them through. So light heads "
            "on the frozen teacher can tell real images from the student's, and the student learns from what they "
            "see. Di[M]O goes on beside it and holds the student in place.",
            {"dimo_gan": "The student after the GAN: still one pass."},
            {"train/gan_accuracy": "discriminator's accuracy", "train/dimo_divergence_per_site": "Di[M]O's divergence"},
        ),
        "5_reward": _Stage(
            "5. Reward",
            "The same expected embedding goes through the tokenizer's decoder, and a reward model looks at the image. "
            "Here it is a classifier that asks for the class; any differentiable reward can take its place.",
            {"dimo_reward": "The student after the reward: still one pass."},
            {"train/reward_score_classifier": "reward"},
        ),
        "6_tteo": _Stage(
            "6. TTEO",
            "Test-time embedding optimisation trains nothing: for each image, gradient steps on the generator's input "
            "embedding raise the reward, and the best hard-decoded image is kept.",
            {"tteo_before": "Before.", "tteo": "After."},
            {},
        ),
    }

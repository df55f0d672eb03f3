"""A user's mistake is one line on stderr that names the key, exit code 2, and nothing half-written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softgen import evaluate, load_tokenizer, quickstart, sample
from softgen.data import Digits, write_token_cache
from softgen.fit import main as fit
from softgen.metrics import SmallClassifier
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.tokenizers import ConvVQTokenizer

TEACHER = {"num_codes": 7, "num_sites": 16, "num_classes": 10, "width": 8, "depth": 1, "heads": 1}
TRANSFORMER = [
    "--model=softgen.training.TeacherTraining",
    "--model.init_args.model=softgen.models.MaskedTransformer",
    "--model.init_args.model.num_classes=10",
    "--model.init_args.model.width=8",
    "--model.init_args.model.depth=1",
    "--model.init_args.model.heads=1",
    "--data=softgen.data.Digits",
]
TOKENIZER = [
    "--model=softgen.training.TokenizerTraining",
    "--model.init_args.tokenizer=softgen.tokenizers.ConvVQTokenizer",
    "--model.init_args.tokenizer.image_size=8",
    "--model.init_args.tokenizer.num_codes=7",
    "--model.init_args.tokenizer.channels=[8,8]",
    "--data=softgen.data.Digits",
]
RUN = ["--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.logger=false"]

Fails = Callable[[Callable[[list[str]], object], list[str]], str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fails:
    monkeypatch.chdir(tmp_path)

    def run(command: Callable[[list[str]], object], words: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(words)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == 2
        assert len(lines) == 1
        return lines[0].split("error: ", 1)[1]

    return run


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    MaskedTransformer(**TEACHER).save_pretrained(tmp_path / "teacher", tokenizer=tokenizer)
    return str(tmp_path / "teacher")


def _distill(teacher: str, *words: str) -> list[str]:
    return [
        "--model=distill.SoftDiMO",
        f"--model.init_args.teacher={teacher}",
        "--data=softgen.data.Labels",
        "--data.init_args.num_classes=10",
        "--data.init_args.batch_size=8",
        *RUN,
        *words,
    ]


def test_fit_options(fails: Fails) -> None:
    assert fails(fit, ["--nonsense=3"]) == "unrecognized arguments: --nonsense=3"
    assert "'nope.yaml'" in fails(fit, ["--config=nope.yaml"]) or "nope.yaml" in fails(fit, ["--config=nope.yaml"])
    unknown = fails(fit, [*TOKENIZER, "--model.init_args.bogus=1"])
    assert unknown == "model.init_args.bogus: unknown key: expected an argument of that class, got 'bogus'"
    assert fails(fit, [*TOKENIZER, "--model.init_args.optimizer.lr=-1"]) == (
        "model.optimizer.lr: expected a number of at least 0, got -1.0"
    )
    assert "trainer.max_steps" in fails(fit, [*TOKENIZER, "--trainer.max_steps=many"])
    assert fails(fit, [*TOKENIZER, "--seed=-4"]) == "seed: expected a number from 0 to 2^32 - 1, got -4"
    assert fails(fit, [*TOKENIZER, "--threads=0"]) == "threads: expected at least 1, got 0"
    assert fails(fit, [*TOKENIZER, "--data.init_args.batch_size=0"]) == ("data.batch_size: expected at least 1, got 0")


def test_unknown_key_in_a_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("trainerz:\n  max_steps: 3\n")
    assert "trainerz" in fails(fit, ["--config=bad.yaml"])
    (tmp_path / "nested.yaml").write_text(
        "model:\n  class_path: softgen.training.TokenizerTraining\n  init_args:\n    warmup_stepz: 3\n"
    )
    assert fails(fit, ["--config=nested.yaml"]) == (
        "model.init_args.warmup_stepz (in nested.yaml): unknown key: expected an argument of that class, "
        "got 'warmup_stepz'"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("groups=3", "tokenizer.groups: expected a divisor of the 8 tokens, got 3"),
        ("image_size=30", "tokenizer.image_size: expected a multiple of the encoder's patch, 7, got 30"),
        ("tau=0", "tokenizer.tau: expected a finite number above 0, got 0.0"),
    ],
)
def test_a_tokenizer_that_is_one_of_several_classes(fails: Fails, option: str, message: str) -> None:
    config = Path(__file__).parents[1] / "configs" / "softvq" / "1_tokenizer.yaml"
    assert fails(fit, [f"--config={config}", f"--model.init_args.tokenizer.init_args.{option}"]) == message


def test_tokenizer_and_model_disagree(fails: Fails, teacher: str) -> None:
    words = [*TRANSFORMER, f"--model.init_args.tokenizer={teacher}", "--run_dir=run"]
    assert fails(fit, [*words, "--model.init_args.model.num_codes=9", "--model.init_args.model.num_sites=16"]) == (
        "model.tokenizer.num_codes: expected 9 as the model has, got 7"
    )
    assert fails(fit, [*words, "--model.init_args.model.num_codes=7", "--model.init_args.model.num_sites=49"]) == (
        "model.tokenizer.num_sites: expected 49 as the model has, got 16"
    )
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "target=snce --model.init_args.two_tau_squared=0",
            "model.two_tau_squared: expected 'auto' or a number above 0, got 0",
        ),
        ("label_dropout=1.5", "model.label_dropout: expected a number in [0, 1], got 1.5"),
        ("label_smoothing=-0.1", "model.label_smoothing: expected a number in [0, 1], got -0.1"),
    ],
)
def test_teacher_options(fails: Fails, teacher: str, option: str, message: str) -> None:
    sizes = ["--model.init_args.model.num_codes=7", "--model.init_args.model.num_sites=16"]
    words = [*TRANSFORMER, *sizes, f"--model.init_args.tokenizer={teacher}"]
    extra = f"--model.init_args.{option}".split()
    assert fails(fit, [*words, *extra]).startswith(message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("r_init=1.2", "generator.r_init: expected a number in [0, 1], got 1.2"),
        ("noise=-1", "generator.noise: expected a number in [0, 1], got -1.0"),
        ("temperature=0", "model.temperature: expected a finite number above 0, got 0.0"),
        ("objectives=[]", "model.objectives: expected at least one objective, got none"),
    ],
)
def test_distillation_options(fails: Fails, teacher: str, option: str, message: str) -> None:
    assert fails(fit, _distill(teacher, f"--model.init_args.{option}")) == message


def test_guidance_needs_a_null_condition(fails: Fails, tmp_path: Path) -> None:
    MaskedTransformer(**TEACHER, null_condition=False).save_pretrained(tmp_path / "plain")
    message = fails(fit, _distill(str(tmp_path / "plain")))
    assert message == "DiMO.guidance: expected 1, since this model has no null condition, got 2.0"


def test_checkpoints_missing_truncated_and_foreign(fails: Fails, teacher: str, tmp_path: Path) -> None:
    assert fails(fit, _distill("nowhere")) == "model.teacher: expected a folder or a hub id 'owner/name', got 'nowhere'"
    (tmp_path / "empty").mkdir()
    assert "expected a folder with config.json" in fails(fit, _distill(str(tmp_path / "empty")))
    weights = Path(teacher) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "model.teacher: expected a whole safetensors file" in fails(fit, _distill(teacher))

    assert fails(fit, [*TOKENIZER, "--ckpt_path=gone.ckpt"]) == (
        "ckpt_path: expected a checkpoint file or 'last', got 'gone.ckpt'"
    )
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert "ckpt_path: expected a whole Lightning checkpoint" in fails(fit, [*TOKENIZER, "--ckpt_path=text.ckpt"])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    assert "which is something else" in fails(fit, [*TOKENIZER, "--ckpt_path=other.ckpt"])


def test_checkpoint_of_another_model(fails: Fails, tmp_path: Path) -> None:
    fit([*TOKENIZER, *RUN, "--run_dir=run"])
    path = next((tmp_path / "run/checkpoints").glob("*.ckpt"))
    wider = [*TOKENIZER, *RUN, "--run_dir=wider", "--model.init_args.tokenizer.code_dim=8", f"--ckpt_path={path}"]
    message = fails(fit, wider)
    assert message.startswith("ckpt_path: expected the tensors of this model, got ")
    assert not Path("wider").exists()


def test_not_a_finite_loss(fails: Fails, teacher: str) -> None:
    objectives = "--model.init_args.objectives=[{class_path: distill.DiMO, init_args: {teacher_temperature: 1.0e-42}}]"
    assert fails(fit, _distill(teacher, objectives, "--run_dir=run")) == (
        "dimo, dimo_divergence_per_site: expected a finite value, got NaN or infinity at step 1"
    )
    assert not list(Path("run").rglob("*.ckpt"))
    assert not Path("run/model").exists()


def test_empty_data_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    words = [word for word in TOKENIZER if not word.startswith("--data")]
    data = ["--data=softgen.data.ImageFolder", "--data.init_args.root=images", "--data.init_args.image_size=8"]
    assert "data.root: expected a folder with images" in fails(fit, [*words, *data, *RUN])


def test_small_commands(fails: Fails, teacher: str, tmp_path: Path) -> None:
    generator = OneStepGenerator(MaskedTransformer(**TEACHER))
    generator.save_pretrained(tmp_path / "student")
    assert "tokenizer: expected" in fails(sample.main, [f"--model={tmp_path / 'student'}"])
    assert fails(sample.main, [f"--model={teacher}", "--n=0"]) == "n: expected at least 1, got 0"
    assert fails(sample.main, [f"--model={teacher}", "--labels=[11]"]) == "labels: expected classes in 0..9, got 11"
    assert fails(sample.main, [f"--model={teacher}", "--steps=99"]) == (
        "steps: expected 1 to 16 (the number of sites), got 99"
    )
    assert fails(sample.main, [f"--model={teacher}", "--guidance=-2"]) == (
        "guidance: expected a scale of at least 0 (1 turns guidance off), got -2.0"
    )
    assert fails(evaluate.main, [f"--model={teacher}/tokenizer"]) == (
        "model: expected a teacher or a one-step generator, got a ConvVQTokenizer"
    )
    assert "data" in fails(quickstart.main, ["--data=cifar"])
    scored = [f"--model={teacher}", "--steps=[1]"]
    assert fails(evaluate.main, [*scored, "--data_name=fashion_mnist"]) == (
        "data_name: expected images of 8 pixels as the model draws, got 28"
    )
    assert fails(evaluate.main, [*scored, "--statistics=x.npz"]) == (
        "statistics: expected extractor inception to go with it, got none"
    )
    assert fails(evaluate.main, [*scored, "--extractor=inception"]) == (
        "statistics: expected a file of statistics or data, one of them, got neither"
    )
    assert fails(evaluate.main, [*scored, "--sampler=published"]) == (
        "sampler: expected maskgit or halton, since no sampler was published for a MaskedTransformer"
    )
    SmallClassifier(name="other", image_size=28, num_classes=10).save(tmp_path / "classifier")
    assert fails(evaluate.main, [*scored, f"--extractor={tmp_path / 'classifier'}"]) == (
        "extractor.image_size: expected 8 as the data has, got 28"
    )
    few = MaskedTransformer(**{**TEACHER, "num_classes": 5})
    few.save_pretrained(tmp_path / "few", tokenizer=load_tokenizer(teacher))
    assert fails(evaluate.main, [f"--model={tmp_path / 'few'}", "--steps=[1]"]) == (
        "data_name: expected 5 classes as the model has, got 10"
    )
    assert not Path("samples").exists()


def test_data_that_does_not_go_with_the_models(fails: Fails, teacher: str) -> None:
    labels = [word for word in _distill(teacher) if "num_classes" not in word]
    assert fails(fit, [*labels, "--data.init_args.num_classes=12", "--run_dir=run"]) == (
        "data.num_classes: expected 10 as the model has, got 12"
    )
    larger = [*TOKENIZER, *RUN, "--model.init_args.tokenizer.image_size=16", "--run_dir=run"]
    assert fails(fit, larger) == "data.image_size: expected 16 pixels as the tokenizer has, got 8"
    assert not list(Path("run").rglob("*.ckpt"))


def test_tokens_of_another_tokenizer(fails: Fails, teacher: str, tmp_path: Path) -> None:
    other = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    write_token_cache(tmp_path / "tokens", other, Digits(), progress=False)
    words = [word for word in TRANSFORMER if not word.startswith("--data")]
    sizes = ["--model.init_args.model.num_codes=7", "--model.init_args.model.num_sites=16"]
    cache = ["--data=softgen.data.TokenCache", f"--data.init_args.root={tmp_path / 'tokens'}"]
    message = fails(fit, [*words, *sizes, *cache, f"--model.init_args.tokenizer={teacher}", *RUN])
    assert message.startswith("data.root: expected tokens of the tokenizer ")

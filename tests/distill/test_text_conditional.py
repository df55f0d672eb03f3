"""Text to image, end to end and tiny: CLIP, tokenizer, teacher, distillation with all objectives, sampling, TTEO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import read_image

from distill import SoftDiMO
from rewards import CLIPReward
from softgen import load_generator, load_model, load_tokenizer
from softgen.data.scenes import TASKS
from softgen.evaluate import evaluate
from softgen.fit import main
from softgen.models import MaskedTransformer, OneStepGenerator, OpenCLIP, WordTextEncoder
from softgen.pretrained import Pretrained, fingerprint
from softgen.sample import sample
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import CLIPTraining, TeacherTraining
from tteo import TTEOSettings, optimize

pytest.importorskip("open_clip", reason="the extra softgen[clip] is not installed")

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 20, "width": 8, "heads": 1, "layers": 1},
}
PROMPTS = ["a red circle", "a ring and a cross", "three blue squares"]


def fit(run_dir: Path, *words: str) -> object:
    cli = main(
        [
            "--data=softgen.data.Shapes",
            "--data.init_args.image_size=16",
            "--data.init_args.batch_size=4",
            "--data.init_args.train_samples=64",
            "--data.init_args.val_samples=12",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.limit_val_batches=1",
            "--trainer.logger=false",
            f"--run_dir={run_dir}",
            *words,
        ]
    )
    return cli.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with random weights, a CLIP and a teacher after two steps each."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("text")
    tokenizer = ConvVQTokenizer(image_size=16, num_codes=8, code_dim=4, channels=(8, 8, 8))
    tokenizer.save_pretrained(root / "tokenizer")
    stage = fit(
        root / "clip",
        "--model=softgen.training.CLIPTraining",
        "--model.init_args.model=softgen.models.OpenCLIP",
        f"--model.init_args.model.init_args.architecture={json.dumps(TINY_CLIP)}",
    )
    assert isinstance(stage, CLIPTraining)
    encoder = {"class_path": "softgen.models.WordTextEncoder", "init_args": {"num_words": 64, "width": 8, "heads": 2}}
    sizes = {"num_codes": 8, "num_sites": 16, "width": 8, "depth": 2, "heads": 2, "text_encoder": encoder}
    teacher = fit(
        root / "teacher",
        "--model=softgen.training.TeacherTraining",
        f"--model.init_args.tokenizer={root}/tokenizer",
        f"--model.init_args.model={json.dumps({'class_path': 'softgen.models.MaskedTransformer', 'init_args': sizes})}",
        "--model.init_args.optimizer.lr=0.05",
    )
    assert isinstance(teacher, TeacherTraining)
    return root


def test_the_scale_of_a_clip_comes_down_again() -> None:
    clip = OpenCLIP(architecture=TINY_CLIP)
    with torch.no_grad():
        clip.model.logit_scale.fill_(4.7)
    clip.limit_logit_scale()
    assert clip.logit_scale.item() == pytest.approx(100, rel=1e-4)
    clip.logit_scale.backward()
    assert clip.model.logit_scale.grad > 0


def test_the_cosines_of_a_clip_keep_their_precision_under_autocast() -> None:
    stage = CLIPTraining(model=OpenCLIP(architecture=TINY_CLIP))
    seen: list[torch.Tensor] = []

    def keep(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen.append(images @ texts.T)
        return seen[-1].sum()

    stage._loss = keep
    stage.report = lambda batch, losses, logs: losses["clip"]  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage.training_step({"image": torch.rand(3, 3, 16, 16), "prompt": PROMPTS}, 0)
    assert seen[0].dtype == torch.float32


def test_a_teacher_learns_its_words_from_the_captions(folder: Path) -> None:
    teacher = load_model(folder / "teacher" / "model")
    assert isinstance(teacher.text_encoder, WordTextEncoder)
    assert {"circle", "red", "and", "of"} <= set(teacher.text_encoder.vocabulary)


def test_snce_measures_its_width_on_captioned_images(folder: Path, tmp_path: Path) -> None:
    encoder = {"class_path": "softgen.models.WordTextEncoder", "init_args": {"num_words": 64, "width": 8, "heads": 2}}
    sizes = {"num_codes": 8, "num_sites": 16, "width": 8, "depth": 1, "heads": 2, "text_encoder": encoder}
    stage = fit(
        tmp_path,
        "--model=softgen.training.TeacherTraining",
        f"--model.init_args.tokenizer={folder}/tokenizer",
        f"--model.init_args.model={json.dumps({'class_path': 'softgen.models.MaskedTransformer', 'init_args': sizes})}",
        "--model.init_args.target=snce",
    )
    assert isinstance(stage, TeacherTraining)
    assert isinstance(stage.two_tau_squared, float)


def test_a_resumed_teacher_must_know_the_same_words(folder: Path) -> None:
    model = MaskedTransformer(
        num_codes=8, num_sites=16, width=8, depth=2, heads=2, text_encoder=WordTextEncoder(vocabulary=["dog"], width=8)
    )
    stage = TeacherTraining(tokenizer=str(folder / "tokenizer"), model=model)
    with pytest.raises(
        ValueError, match=r"^model.text_encoder.vocabulary: expected the words of the checkpoint, with "
    ):
        stage.on_load_checkpoint({"vocabulary": ["a", "dog"]})


def test_the_clip_opens_as_a_reward_and_scores_alike(folder: Path) -> None:
    clip = Pretrained.from_pretrained(folder / "clip" / "model")
    assert isinstance(clip, OpenCLIP)
    reward = CLIPReward(f"local-dir:{folder}/clip/model")
    images = torch.rand(3, 3, 16, 16)
    expected = (clip.encode_images(images) * clip.encode_prompts(PROMPTS)).sum(dim=1)
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)


def test_distillation_with_every_objective_then_sampling_and_tteo(folder: Path, tmp_path: Path) -> None:
    reward = {"class_path": "rewards.CLIPReward", "init_args": {"model_name": f"local-dir:{folder}/clip/model"}}
    objectives = [
        {"class_path": "distill.DiMO", "init_args": {"guidance": 2.0}},
        {"class_path": "distill.GAN"},
        {"class_path": "distill.Reward", "init_args": {"rewards": [reward], "held_out_every": 1, "micro_batch": 2}},
    ]
    before = fingerprint(load_model(folder / "teacher" / "model"))
    stage = fit(
        tmp_path / "student",
        "--model=distill.SoftDiMO",
        f"--model.init_args.teacher={folder}/teacher/model",
        f"--model.init_args.objectives={json.dumps(objectives)}",
        "--model.init_args.optimizer.lr=0.05",
    )
    assert isinstance(stage, SoftDiMO)
    assert all(value.isfinite().all() for value in stage.latest_values.values())
    assert fingerprint(stage.teacher) == before
    student = load_generator(tmp_path / "student" / "model")
    assert student.model.text_encoder is not None
    assert stage.teacher.text_encoder is not None
    assert fingerprint(student.model.text_encoder) == fingerprint(stage.teacher.text_encoder)
    assert fingerprint(student.model) != before

    sample(model=str(tmp_path / "student" / "model"), out=str(tmp_path / "samples"), n=5, prompts=PROMPTS, device="cpu")
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 5

    tokenizer = load_tokenizer(tmp_path / "student" / "model")
    climbed = CLIPReward(f"local-dir:{folder}/clip/model")
    result = optimize(student, tokenizer, climbed, PROMPTS, settings=TTEOSettings(steps=2, lr=10.0))
    assert result.images.shape == (3, 3, 16, 16)
    assert bool((result.after >= result.before).all())
    others = optimize(student, tokenizer, climbed, PROMPTS[::-1], settings=TTEOSettings(steps=2, lr=10.0))
    assert not torch.equal(result.soft_scores[:, 0], others.soft_scores[:, 0])


def test_a_student_that_reads_prompts_otherwise_is_refused(folder: Path) -> None:
    message = r"^model.student.text_encoder: expected one as the teacher has, got another or none$"
    teacher = load_model(folder / "teacher" / "model")
    SoftDiMO(teacher=teacher, student=OneStepGenerator(load_model(folder / "teacher" / "model")))
    halved = load_model(folder / "teacher" / "model").bfloat16()
    SoftDiMO(teacher=teacher, student=OneStepGenerator(halved))
    for change in ("weights", "words"):
        other = load_model(folder / "teacher" / "model")
        assert isinstance(other.text_encoder, WordTextEncoder)
        if change == "weights":
            torch.nn.init.normal_(other.text_encoder.position)
        else:
            other.text_encoder.learn_words(["a dog"])
        with pytest.raises(ValueError, match=message):
            SoftDiMO(teacher=teacher, student=OneStepGenerator(other))


def test_labels_are_not_enough_for_a_text_conditional_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "--model=distill.SoftDiMO",
                f"--model.init_args.teacher={folder}/teacher/model",
                "--data=softgen.data.Labels",
                "--data.init_args.num_classes=3",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=1",
                "--trainer.logger=false",
                f"--run_dir={folder}/refused",
            ]
        )
    assert "data: expected prompts, since the model is text-conditional, got a Labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, since this model is text-conditional, got none"),
        ({"labels": [1]}, "labels: expected prompts, since this model is text-conditional, got labels"),
        ({"prompts": ["a"], "prompt_file": "b.txt"}, "prompt_file: expected prompts or a file of them, got both"),
        ({"prompt_file": "missing.txt"}, "^prompt_file: expected text in UTF-8, got 'missing.txt'"),
        ({"prompt_file": "table.csv"}, "^prompt_file: expected one of .txt, .jsonl, .parquet, got 'table.csv'$"),
    ],
)
def test_sampling_without_prompts_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model=str(folder / "teacher" / "model"), out=str(tmp_path), device="cpu", **options)  # type: ignore[arg-type]


def test_evaluation_on_unseen_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(
        model=str(folder / "teacher" / "model"),
        task="shapes",
        clip=str(folder / "clip" / "model"),
        n=12,
        steps=[1, 2],
        guidance=2.0,
        out=str(tmp_path / "scores.json"),
        device="cpu",
    )
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["maskgit_1", "maskgit_2"]
    assert set(rows[0]["tasks"]) == {*TASKS, "overall"}
    assert all(-1 <= row["clip"] <= 1 and row["n"] == 12 for row in rows)
    assert "overall" in capsys.readouterr().out


def test_evaluation_as_classes_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^task: expected shapes or geneval for a text-conditional model, got classes$"
    ):
        evaluate(model=str(folder / "teacher" / "model"), device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data=softgen.data.Labels", "--data.init_args.num_classes=3"],
            "data: expected captioned images, got a Lab",
        ),
        (["--data.init_args.image_size=32"], "data.image_size: expected 16 pixels as the model has, got 32"),
        (
            ["--model.init_args.model.init_args.architecture=nonsense"],
            "clip.architecture: expected one that open_clip knows, got 'nonsense'",
        ),
        (
            ['--model.init_args.model.init_args.architecture={"embed_dim": 8}'],
            "clip.architecture: expected settings of open_clip",
        ),
    ],
)
def test_a_clip_that_cannot_be_trained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model=softgen.training.CLIPTraining", "--model.init_args.model=softgen.models.OpenCLIP"]
    architecture = f"--model.init_args.model.init_args.architecture={json.dumps(TINY_CLIP)}"
    with pytest.raises(SystemExit):
        fit(tmp_path, *model, architecture, *words)
    assert message in capsys.readouterr().err


METADATA = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a photo of a red ring"},
    {"tag": "counting", "include": [{"class": "cross", "count": 2}], "prompt": "a photo of two crosses"},
]


def test_genevals_own_folders_and_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    words: dict[str, Any] = {"model": f"{folder}/teacher/model", "task": "geneval", "metadata": str(metadata)}
    for name, batch_size in (("one", 4), ("many", 256)):
        evaluate(**words, images=str(tmp_path / name), batch_size=batch_size, steps=[2], device="cpu")
    with pytest.raises(ValueError, match=r"temperature 0\.7, .* got '.*temperature 1, .*take another folder"):
        evaluate(**words, images=str(tmp_path / "one"), steps=[2], device="cpu", temperature=0.7)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("0*/samples/*.png"))
    assert [str(path) for path in files[:5]] == [
        *(f"00000/samples/000{i}.png" for i in range(4)),
        "00001/samples/0000.png",
    ]
    assert len(files) == 12
    for path in files:
        one, many = (read_image(str(tmp_path / name / path)).int() for name in ("one", "many"))
        assert int((one - many).abs().max()) <= 1  # other batches may round otherwise
    pictures = {(tmp_path / "one" / path).read_bytes() for path in files}
    assert len(pictures) == 12

    results = tmp_path / "results.jsonl"
    rows = [
        {
            "filename": f"images/{index:05}/samples/{sample:04}.png",
            "correct": sample < index + 2,
            "metadata": json.dumps(row),
            "details": "{}",
            "reason": "",
            **row,
        }
        for index, row in enumerate(METADATA)
        for sample in range(4)
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(task="geneval", metadata=str(metadata), results=str(results), out=str(tmp_path / "table.json"))
    table = json.loads((tmp_path / "table.json").read_text())["tasks"]
    assert table == {"single_object": 0.5, "counting": 1.0, "colors": 0.75, "overall": 0.75}
    assert "overall 0.750" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "geneval"}, r"^model: expected a folder or hub id, got none$"),
        ({"task": "geneval", "model": "x"}, r"^metadata: expected a path for task geneval, got none$"),
        ({"task": "geneval", "model": "x", "metadata": "y"}, r"^images: expected a path for task geneval, got none$"),
        ({"results": "x"}, r"^metadata: expected the file that the images were made from, got none$"),
    ],
)
def test_geneval_without_its_paths(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**options)

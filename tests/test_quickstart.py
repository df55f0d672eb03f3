"""The quickstart from end to end, cut short: what it writes, and that one path is enough afterwards."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from softgen import classifier, evaluate, load_generator, load_model, load_tokenizer, sample
from softgen.classifier import RECIPES
from softgen.data import Digits, ImageDataModule, Labels, TokenCache, write_token_cache
from softgen.pretrained import fingerprint
from softgen.quickstart import main as quickstart
from softgen.testing import ToyTokenizer

ROWS = ["tokenizer", "teacher_1", "teacher_4", "teacher_8", "teacher_16", "dimo", "dimo_gan", "dimo_reward", "tteo"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    short = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", replace(RECIPES["digits"], epochs=4))  # type: ignore[arg-type]
        quickstart([f"--out={folder}", "--n=80", "--seed=3", f"--overrides={json.dumps(short)}"])
    return folder


def test_metrics(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["protocol"] == "fd_digitsnet_80"
    assert metrics["seed"] == 3
    assert metrics["wall_seconds"] > 0
    assert [row["name"] for row in metrics["rows"]] == ROWS
    for row in metrics["rows"]:
        assert row.keys() == {"name", "fd", "n", "accuracy", "precision", "recall", "reward", "seconds"}
        assert row["n"] == 80
        assert row["fd"] > 0
        assert 0 <= row["accuracy"] <= 1
    assert metrics["real_accuracy"] > 0.97


def test_report_is_self_contained(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in ROWS)
    assert "fd_digitsnet_80" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_one_path_is_enough(run: Path) -> None:
    assert load_tokenizer(run / "1_tokenizer/model").num_codes == 64
    assert load_model(run / "2_teacher/model").num_sites == 16
    assert load_tokenizer(run / "2_teacher/model").num_codes == 64
    assert load_generator(run / "3_dimo/model").metadata["guidance"] == 1.5
    assert list((run / "3_dimo/samples").glob("step_*.png"))
    assert list((run / "3_dimo/checkpoints").glob("step_*.ckpt"))


def test_sample_and_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main([f"--model={run / '3_dimo/model'}", f"--out={tmp_path}", "--n=6", "--labels=[3,7]", "--device=cpu"])
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    assert (tmp_path / "grid.png").is_file()
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    sample.main([f"--model={run / '3_dimo/model'}", f"--out={tmp_path}", "--n=2", "--labels=[3]", "--device=cpu"])
    left = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert left == ["00000.png", "00001.png", "mine.png"], "none of the run before"

    words = [f"--model={run / '2_teacher/model'}", "--n=40", "--steps=[2,4]", "--device=cpu"]
    evaluate.main([*words, f"--extractor={run / 'extractor'}", f"--out={tmp_path / 'rows.json'}"])
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = written.pop("rows")
    teacher = str(run / "2_teacher/model")
    assert written == {
        "model": teacher,
        "model_fingerprint": fingerprint(load_model(teacher)),
        "tokenizer": teacher,
        "tokenizer_fingerprint": fingerprint(load_tokenizer(teacher)),
        "seed": 0,
        "temperature": 1.0,
        "guidance": 1.0,
        "confidence_noise": 4.5,
    }
    assert [row["name"] for row in rows] == ["maskgit_2", "maskgit_4"]
    assert all(row["protocol"] == "fd_digitsnet_40" for row in rows)
    assert "fd_digitsnet_40" in capsys.readouterr().out


def test_what_holds_no_images_is_nothing_to_compare_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    write_token_cache(tokens, load_tokenizer(str(run / "2_teacher/model")), Digits(), progress=False)
    cache = ["--data=softgen.data.TokenCache", f"--data.root={tokens}"]
    labels = ["--data=softgen.data.Labels", "--data.num_classes=10", "--data.image_size=8"]
    words = [f"--model={run / '2_teacher/model'}", f"--extractor={run / 'extractor'}", "--n=40", "--device=cpu"]
    for data, name in ((cache, "TokenCache"), (labels, "Labels")):
        for main, own in ((evaluate.main, words), (classifier.main, [f"--out={tmp_path / 'net'}"])):
            with pytest.raises(SystemExit):
                main([*own, *data])
            assert f"data: expected images, got {name}" in capsys.readouterr().err
        with pytest.raises(ValueError, match=f"^data: expected images, got {name}$"):
            write_token_cache(tmp_path / "again", ToyTokenizer(), _opened(name, tokens), progress=False)
    assert not (tmp_path / "net").exists()
    assert not (tmp_path / "again").exists()


def _opened(name: str, tokens: Path) -> ImageDataModule:
    return TokenCache(tokens) if name == "TokenCache" else Labels(num_classes=10, image_size=8)


def test_a_classifier_of_ones_own_must_be_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--model={run / '2_teacher/model'}", "--data=softgen.data.Digits", "--n=40", "--steps=[2]"]
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--device=cpu", f"--extractor={tmp_path / 'extracter'}"])
    assert "extractor: expected the folder of a classifier or inception, got " in capsys.readouterr().err
    assert not (tmp_path / "extracter").exists()

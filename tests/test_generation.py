import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from softgen.generation import Generated, balanced_labels, generate, one_step_tokens, teacher_tokens
from softgen.models import OneStepGenerator
from softgen.sample import _write
from softgen.sampling import HaltonSampler, MaskGITSampler
from softgen.testing import ToyMaskedModel, ToyTokenizer, count_calls

TOY = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=3)
TOKENIZER = ToyTokenizer(num_codes=3)
SOURCES = {
    "maskgit": teacher_tokens(TOY, MaskGITSampler(steps=2, guidance=2.0)),
    "halton": teacher_tokens(TOY, HaltonSampler(steps=4)),
    "one step": one_step_tokens(OneStepGenerator(TOY, r_init=0.5)),
}


def test_images_do_not_depend_on_the_batch_size() -> None:
    labels = balanced_labels(7, num_classes=2)
    for source in SOURCES.values():
        whole = generate(source, TOKENIZER, labels, seed=0)
        assert whole.images.shape == (7, 3, 8, 8)
        assert whole.seconds > 0
        for batch_size in (1, 3):
            parts = generate(source, TOKENIZER, labels, seed=0, batch_size=batch_size)
            assert torch.equal(parts.images, whole.images)
        assert not torch.equal(generate(source, TOKENIZER, labels, seed=1).images, whole.images)


def test_the_first_images_do_not_depend_on_how_many_follow() -> None:
    labels = balanced_labels(9, num_classes=2)
    few = generate(SOURCES["maskgit"], TOKENIZER, labels[:4], seed=0)
    assert torch.equal(generate(SOURCES["maskgit"], TOKENIZER, labels, seed=0).images[:4], few.images)


def test_images_are_those_of_the_tokens() -> None:
    codes = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
    made = generate(lambda labels, noise: codes[labels], TOKENIZER, torch.tensor([1, 0, 1]), seed=0)
    assert torch.equal(made.images, TOKENIZER.decode(codes[[1, 0, 1]]))


def test_a_generator_takes_one_pass_a_batch_and_its_temperature() -> None:
    student = OneStepGenerator(TOY, r_init=1.0, noise=0.0)
    labels = balanced_labels(6, num_classes=2)
    with count_calls(TOY) as count:
        cold = generate(one_step_tokens(student, temperature=0), TOKENIZER, labels, seed=0, batch_size=4)
    assert count.samples == [4, 2]
    assert torch.equal(cold.images[0::2], cold.images[:1].expand(3, -1, -1, -1))


def test_labels_go_round() -> None:
    assert balanced_labels(5, num_classes=3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_labels(3, num_classes=0).tolist() == [0, 0, 0]


def test_one_text_is_not_a_list_of_letters() -> None:
    with pytest.raises(ValueError, match="expected a list of prompts"):
        generate(SOURCES["one step"], TOKENIZER, "a red cat", seed=0)


def test_images_are_written_as_they_come_and_not_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays: list[weakref.ref[np.ndarray]] = []

    def batches() -> Iterator[Generated]:
        for _ in range(6):
            pixels = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
            arrays.append(weakref.ref(pixels))
            images = torch.from_numpy(pixels)
            del pixels
            yield Generated(images=images, seconds=0.25)
            del images
            gc.collect()
            assert sum(array() is not None for array in arrays) <= 1  # the reader's own variable

    _write(batches(), tmp_path, columns=2, save_images=True)
    assert len(list((tmp_path / "images").iterdir())) == 18
    assert "18 images in 1.50 s" in capsys.readouterr().out

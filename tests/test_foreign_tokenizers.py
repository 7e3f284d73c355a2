"""A tokenizer of another model: refused, or warned of, in every command; random weights pass."""

import warnings

import pytest
from conftest import tiny_qwen3

from oprd_nb.cli import main
from oprd_nb.models.loading import load_model, load_tokenizer
from oprd_nb.models.tokenizers import TextReading, check_reading, check_tokenizer


def with_foreign_tokenizer(folder):
    """The teacher with tokens of its own, and the tokenizer of the student in its folder."""
    load_model("embedded/teacher_tokens", device="cpu").save_pretrained(folder)
    load_tokenizer("embedded/student").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "command",
    [
        "train --student embedded/student --teacher FOREIGN --prompts arithmetic --output_dir OUT",
        "train --student FOREIGN --teacher embedded/teacher --prompts arithmetic --output_dir OUT",
        "probe FOREIGN embedded/teacher arithmetic --out OUT",
        "probe embedded/student FOREIGN arithmetic --out OUT",
        "bridge FOREIGN embedded/teacher --prompts arithmetic --out OUT",
        "bridge embedded/student FOREIGN --prompts arithmetic --out OUT",
        "eval FOREIGN --task arithmetic --out OUT",
        "export FOREIGN --out OUT",
    ],
)
def test_a_tokenizer_of_another_model_is_refused_by_every_command(tmp_path, capsys, command):
    folder = with_foreign_tokenizer(tmp_path / "foreign")
    words = [{"FOREIGN": folder, "OUT": str(tmp_path / "out")}.get(word, word) for word in command.split()]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is another model's" in error
    assert f"model {folder}, tokenizer {folder}" in error
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_text_as_shuffled_is_warned_of(monkeypatch):
    model = load_model("embedded/student", device="cpu")
    tokenizer = load_tokenizer("embedded/student")
    for order, sure, warned in ((0.1, 0.5, True), (2.0, 0.5, False), (0.1, 0.9, False)):
        reading = TextReading(texts=3, evenness=sure, unknown=0.0, order=order)
        monkeypatch.setattr("oprd_nb.models.tokenizers.read_texts", lambda *_, found=reading: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_reading(model, tokenizer, "student")
        assert [str(entry.message)[:17] for entry in caught] == ["student tokenizer"] * warned
        tokenizer = load_tokenizer("embedded/student")


@pytest.mark.parametrize("vocabulary", [21, 64, 5000])
def test_random_weights_pass_with_any_tokenizer(vocabulary):
    model = tiny_qwen3(vocab_size=vocabulary)
    for scale in (1, 10, 10):
        for parameter in model.parameters():
            parameter.data *= scale
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_tokenizer(model, load_tokenizer("embedded/student"), "student")

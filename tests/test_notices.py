"""A normal run is without notices of other libraries, and none of our code uses what will be removed."""

import warnings

import pytest
from short_runs import short_run

from oprd_nb.cli import main
from oprd_nb.models.memory import layer_bytes
from oprd_nb.objectives.representation import Representation
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


def test_a_training_run_warns_of_nothing(same, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OPRDTrainer(
            model=same.student,
            teacher=Teacher(same.teacher, same.teacher_tokenizer),
            objective=Representation(),
            args=short_run(
                tmp_path, max_steps=2, gradient_checkpointing=True, eval_strategy="steps", eval_steps=1
            ),
            train_dataset=same.task.train,
            eval_dataset=same.task.test.select(range(4)),
            processing_class=same.tokenizer,
        ).train()
        layer_bytes(same.student.config, checkpointing=True, tokens=8)
    assert [f"{entry.filename}: {entry.message}" for entry in caught] == []


SHORT = "--max_steps 2 --max_completion_length 24 --disable_tqdm true --limit 32"
COMMANDS = {
    "train": f"train embedded/student embedded/teacher arithmetic --output_dir OUT {SHORT} "
    "--test arithmetic --samples 1 --validation arithmetic --eval_strategy steps --eval_steps 2",
    "probe": "probe embedded/student embedded/teacher arithmetic --out OUT --limit 8 --max_new_tokens 24",
    "bridge": "bridge embedded/student embedded/teacher_wide --out OUT --limit 16 --max_new_tokens 24",
    "eval": "eval embedded/student --task arithmetic --out OUT --limit 8 --samples 1 --max_new_tokens 24",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_writes_no_notice(tmp_path, capfd, command):
    words = COMMANDS[command].replace("OUT", str(tmp_path / "out")).split()
    assert main(words) == 0
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and "problem/s" not in line] == []

"""Every option of an objective is reachable from `oprd train`, and changes what is trained."""

import json

import pytest

from oprd_nb.cli import main
from oprd_nb.cli.request import TrainArguments, objective_of

PAIR = ("embedded/student", "embedded/teacher", "arithmetic")
SHORT = (
    "--max_steps 1 --max_completion_length 40 --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
)
SHORT += " --use_cpu true --save_strategy no --disable_tqdm true"

OPTIONS = [
    (dict(method="opd-full", divergence="forward"), "divergence='forward'"),
    (dict(method="opd-full", divergence="jsd", jsd_weight=0.9), "beta=0.9"),
    (dict(method="opd-topk", k=4), "k=4"),
    (dict(method="opd-topk", renormalize=True), "renormalize=True"),
    (dict(method="opd-sampled", control_variate=True), "control_variate=True"),
    (dict(final_norm=False), "final_norm=False"),
    (dict(method="opd-full", mu=2.0, reduction="sequence"), "reduction='sequence'"),
]


@pytest.mark.parametrize("options, named", OPTIONS, ids=lambda value: str(value)[:40])
def test_an_option_reaches_the_objective(options, named):
    request = TrainArguments(*PAIR, **options)
    assert named in repr(objective_of(request.method, request))


def test_layers_are_paired_by_similarity_in_a_run(tmp_path):
    argv = ["train", *PAIR, "--output_dir", str(tmp_path / "run"), *SHORT.split()]
    assert main([*argv, "--layer_pairs", "similarity", "--reduction", "sequence"]) == 0
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert about["reduction"] == "sequence"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ("--k 32", "k=32: is an option of opd-topk"),
        ("--divergence jsd", "divergence='jsd': is an option of opd-full"),
        ("--divergence jds --method opd-full", "did you mean jsd?"),
        ("--jsd_weight 2 --method opd-full", "jsd_weight=2.0: must be between 0 and 1"),
        ("--k 0 --method opd-topk", "k=0: must be between 1 and"),
        ("--layer_pairs similarity --layers odd", "layers='odd'"),
        ("--layer_pairs similarity --method bridge", "layer_pairs='similarity'"),
        ("--teacher_quantize int4", "teacher_quantize='int4'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(wrong, named, tmp_path, capsys):
    assert main(["train", *PAIR, "--output_dir", str(tmp_path / "run"), *wrong.split()]) == 2
    assert named in capsys.readouterr().err

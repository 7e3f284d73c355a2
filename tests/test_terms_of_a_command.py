"""Every option of an objective is reachable from `oprd train`, and changes what is trained."""

import json

import pytest

from oprd_nb.cli import main
from oprd_nb.cli.request import TrainArguments, objective_of
from oprd_nb.runs import read_run

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
    (dict(method="transitions", layers="1,3", distance="cosine"), "Transitions(layers='1,3'"),
    (dict(method="relational", positions="first:9"), "Relational(layers='all', positions='first:9'"),
    (dict(method="weighted", distance="mse"), "distance='mse'"),
    (dict(method="gated"), "at_least=0.1"),
    (dict(method="last-opd", positions="all"), "CrossFade(terms=[(1.0, Representation(layers='last'"),
    (dict(method="opd-tail", k=4), "TopKTailKL(k=4"),
    (dict(method="last-opd", reduction="sequence"), "reduction='sequence'"),
    (dict(reward=0.5, reduction="sequence"), "(0.5, TaskReward(reward=None, baseline='group'"),
    (dict(method="opd-topk", mu=2.0, reward=0.5), "(0.5, TaskReward("),
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
        ("--method relational --distance mse", "distance='mse': is no option of relational"),
        ("--method last-opd --layers 1,2", "layers='1,2': is no option of last-opd"),
        ("--method transitions --layers last", "a step is between two layers"),
        ("--method gated --mu 2", "mu=2.0: weights a term added to an output-space method"),
        ("--teacher_quantize int4", "teacher_quantize='int4'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(wrong, named, tmp_path, capsys):
    assert main(["train", *PAIR, "--output_dir", str(tmp_path / "run"), *wrong.split()]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("method", ["transitions", "relational", "weighted", "gated", "last-opd", "opd-tail"])
def test_a_followup_runs_under_its_name(method, tmp_path):
    argv = ["train", *PAIR, "--output_dir", str(tmp_path / "run"), *SHORT.split(), "--method", method]
    assert main(argv) == 0
    assert read_run(tmp_path / "run").method == method

"""Shapes in signatures are checked, not only written.

The main path runs in a process where jaxtyping wraps the package at import.
"""

import subprocess
import sys
import textwrap

MAIN_PATH = textwrap.dedent("""
    import warnings
    from jaxtyping import install_import_hook
    import beartype
    # A whole number is a float, as for type checkers.
    beartype.beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
    install_import_hook("oprd_nb", "beartype.beartype")
    import torch
    from oprd_nb.capture import capture
    from oprd_nb.core import Positions
    from oprd_nb.models import embedded
    from oprd_nb.objectives import FullKL, Representation, SampledTokenKL, TopKKL, loss_of
    from oprd_nb.rollouts import HFSampler
    from oprd_nb.structure import Moments, rank_curve, suggest_rank
    from oprd_nb.teachers import Teacher

    warnings.simplefilter("ignore", UserWarning)
    for name in ("same", "cross_tokenizer"):
        pair = embedded(name)
        prompts = pair.task.train["prompt"][:4]
        rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, max_new_tokens=30)
        teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
        terms = [Representation(), Representation(distance="mse", positions="last:30%", predicting=True)]
        if name == "same":
            terms += [SampledTokenKL(control_variate=True), TopKKL(3), FullKL("jsd"), FullKL("forward")]
        for term in terms:
            loss_of(1.0 * term, pair.student, teacher, rollouts, pair.tokenizer)[0].backward()
        pairs = teacher.read(rollouts, pair.tokenizer)
        with torch.no_grad():
            ids, mask = rollouts.input_ids, rollouts.attention_mask
            student_states = capture(pair.student, ids, mask, pairs.student_rows, [2])[2]
        teacher_states = teacher.capture(pairs, {2: pairs.teacher_rows})[2]
        moments = Moments([(2, 2)], 96, 96)
        moments.update((2, 2), student_states, teacher_states)
        rank_curve(moments, heldout={(2, 2): (student_states, teacher_states)}, ranks=[1, 8])
        suggest_rank(moments, heldout={(2, 2): (student_states, teacher_states)})
    try:
        capture(pair.student, rollouts.input_ids[0], rollouts.attention_mask, pairs.student_rows, [2])
    except Exception as error:
        assert "Type-check error" in str(error), error
        print("checked")
""")


def test_the_main_path_keeps_its_shapes():
    done = subprocess.run([sys.executable, "-c", MAIN_PATH], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "checked", done.stderr[-2000:]

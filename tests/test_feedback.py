"""Every command says something soon after its imports, and again and again until it ends."""

import os
import pty
import subprocess
import sys
import termios
import time

import pytest

FIRST = 5.0
"""Seconds from the imports to the first output."""
BETWEEN = 10.0
"""Seconds between two outputs, and from the last one to the end."""

COMMANDS = {
    "train": "train embedded/student embedded/teacher arithmetic --output_dir OUT --max_steps 4 --limit 64 "
    "--max_completion_length 48 --test arithmetic --samples 1 --save_strategy no",
    "eval": "eval embedded/student embedded/teacher --task arithmetic --out OUT --samples 1 "
    "--max_new_tokens 48",
    "probe": "probe embedded/student embedded/teacher arithmetic --out OUT --max_new_tokens 48",
    "bridge": "bridge embedded/student embedded/teacher_wide --out OUT --limit 256 --max_new_tokens 48",
    "demo": "demo --quick --out OUT",
}


def output_times(words: list[str]) -> list[float]:
    """Seconds of every output of a command in a terminal, from the end of its imports, and of its end."""
    code = (
        f"import oprd_nb.cli.{words[0]}; from oprd_nb.cli import main; print('imported', flush=True); "
        f"raise SystemExit(main({words!r}))"
    )
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))  # tqdm draws nothing into a terminal without a width
    with subprocess.Popen([sys.executable, "-c", code], stdout=end, stderr=end) as process:
        os.close(end)
        times: list[float] = []
        while True:
            try:
                text = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if (times and text.strip()) or b"imported" in text:
                times.append(time.monotonic())
        process.wait()
    os.close(terminal)
    assert process.returncode == 0
    times.append(time.monotonic())
    return [moment - times[0] for moment in times]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_never_silent_for_long(tmp_path, command):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in COMMANDS[command].split()]
    times = output_times(words)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[0] <= FIRST
    assert max(gaps) <= BETWEEN
    print(f"{command}: first after {gaps[0]:.1f} s, longest silence {max(gaps):.1f} s of {times[-1]:.0f} s")

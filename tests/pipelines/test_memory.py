"""The peak of a process's memory."""

import subprocess
import sys

import torch

from rewind.pipelines.evaluation.memory import held_memory, peak_memory


def test_the_peak_grows_with_what_is_held_and_stays():
    before = peak_memory()
    held = torch.ones(int(before + 200) * 2**18)  # MiB of float32, more than all that was ever held
    during = peak_memory()
    assert during - before > 100
    assert during - 1 <= held_memory() <= during + 1  # the system counts in steps
    del held
    assert peak_memory() >= during - 1
    assert held_memory() < during - 100


def test_a_process_does_not_begin_at_what_its_parent_holds():
    held = torch.ones(2000 * 2**18)  # MiB; a process that has loaded torch and no more holds a quarter of it
    code = "from rewind.pipelines.evaluation.memory import peak_memory; print(peak_memory())"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout
    assert 0 < float(told) < 1500
    del held

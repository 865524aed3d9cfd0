"""The peak of a process's memory."""

import torch

from rewind.pipelines.evaluation.memory import peak_memory


def test_the_peak_grows_with_what_is_held_and_stays():
    before = peak_memory()
    held = torch.ones(int(before + 200) * 2**18)  # MiB of float32, more than all that was ever held
    during = peak_memory()
    assert during - before > 100
    del held
    assert peak_memory() >= during

"""Settings for each kind of edit (Dreamix, arXiv 2302.01329).

The paper's own: how to fine-tune for which kind, from its ablation by human preference (shares of the votes)

    kind        none   clip alone   mixed
    motion      17 %      25 %       47 %
    style       67 %       7 %       20 %
    object      36 %      30 %       18 %
    background  19 %      28 %       44 %

and that a picture and a subject are learnt from frames alone (alpha 0), a subject then generated from pure noise
(s = 1). No number for s, the downsampling or the steps is public: all of them are ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Settings of one kind of edit.

    s: 0..1, the noise as a time of the paper's schedule (ours; 1 for a subject is the paper's). factor: how far the
    clip is downsampled a side, 1 or more, stride in time (both ours; 1 not at all). alpha: 0..1, the clip's share of
    the fine-tuning (0 the paper's; 0.5 for mixed and 1 for the clip alone ours, as the paper gives no number).
    fine_tune_steps: 0 where the paper's raters preferred no fine-tuning, else ours. second_pass: s of the second pass
    over the enlarged result (ours; 0 for none).
    """

    s: float
    factor: float
    stride: int
    alpha: float
    fine_tune_steps: int
    second_pass: float

    def __str__(self) -> str:
        """All of it in a line a setting, to be shown on a node."""
        return "\n".join(
            (
                f"s {self.s:g}, factor {self.factor:g}, stride {self.stride}",
                f"fine-tuning: {self.fine_tune_steps} steps, alpha {self.alpha:g}",
                f"second pass: s {self.second_pass:g}",
            )
        )


STEPS = 100  # of a fine-tuning

PRESETS = {
    "motion": Preset(s=0.96, factor=4.0, stride=2, alpha=0.5, fine_tune_steps=STEPS, second_pass=0.3),
    "style": Preset(s=0.8, factor=2.0, stride=1, alpha=0.5, fine_tune_steps=0, second_pass=0.3),
    # The clip alone came next after no fine-tuning: alpha 1 for who raises the steps.
    "object": Preset(s=0.9, factor=4.0, stride=1, alpha=1.0, fine_tune_steps=0, second_pass=0.3),
    "background": Preset(s=0.85, factor=4.0, stride=1, alpha=0.5, fine_tune_steps=STEPS, second_pass=0.3),
    "animate": Preset(s=0.9, factor=4.0, stride=1, alpha=0.0, fine_tune_steps=STEPS, second_pass=0.3),
    # Nothing of the pictures is passed in, so nothing is downsampled.
    "subject": Preset(s=1.0, factor=1.0, stride=1, alpha=0.0, fine_tune_steps=STEPS, second_pass=0.3),
}

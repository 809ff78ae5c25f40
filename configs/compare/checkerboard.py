"""Nine methods on the checkerboard with one teacher, one network and one budget of training compute for every student.

    pflow compare --config configs/compare/checkerboard.py --workdir runs/compare_board --seeds 0,1,2

Hardware and cost: any; a seed is a teacher of 4.1e12 operations and 18 students of 3e12, 5.8e13 in all, and 18
evaluations: 45 minutes on one core. Measured with one seed: docs/compare_checkerboard.md. What is in the table, and how
it is fair: see digits.py beside this file.
"""

import pathlib

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).parents[1]
ALONE, TOGETHER = ((1,), (2,), (4,), (8,)), ((1, 2, 4, 8),)  # a student for each NFE, or one for all


def get_config(variant: str = "full") -> ConfigDict:
  """`variant` is "full", or "quicktest" for a smoke test."""
  if variant not in ("full", "quicktest"):
    raise ValueError(f"variant: expected 'full' or 'quicktest', got {variant!r}")
  quicktest = variant == "quicktest"

  def board(name: str) -> str:
    return f"{HERE}/checkerboard.py:{name}{',quicktest' if quicktest else ''}"

  config = ConfigDict()
  config.teacher = dict(config=board("flow_teacher"))
  config.weak = dict(config=board("flow_teacher"), overrides=dict(train=dict(steps=2 if quicktest else 500)))
  config.flops = 1e7 if quicktest else 3e12
  config.methods = (
    dict(name="gmflow", title="π-Flow, GMFlow", config=board("gmflow"), students=ALONE),
    dict(name="dx", title="π-Flow, DX", config=board("dx"), students=ALONE),
    dict(name="arc", title="ArcFlow", config=board("arc"), students=ALONE),
    dict(name="ayf_emd", title="AYF-EMD", config=board("ayf_emd"), students=TOGETHER),
    dict(
      name="ayf_emd_autoguided",
      title="AYF-EMD + autoguidance",
      config=board("ayf_emd"),
      students=TOGETHER,
      weak=True,
      overrides=dict(objective=dict(guidance=(1.0, 2.0)), sample=dict(guidance=1.5)),
    ),
    dict(
      name="ayf_emd_adversarial",
      title="AYF-EMD + adversarial",
      config=board("ayf_emd_adversarial"),
      students=TOGETHER,
      start="ayf_emd",
      overrides=dict(objective=dict(warmup_steps=0)),  # it starts where the derivative counts in full
    ),
    dict(name="ayf_lmd", title="AYF-LMD", config=board("ayf_lmd"), students=TOGETHER),
    dict(name="mean_flow", title="MeanFlow", config=board("mean_flow"), students=TOGETHER),
    dict(name="consistency", title="consistency", config=board("consistency"), students=TOGETHER),
  )
  return config

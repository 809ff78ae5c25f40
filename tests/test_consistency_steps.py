"""The figure of benchmarks/consistency_steps.py: errors that grow with the steps, and errors that do not."""

import numpy as np
import pytest

from benchmarks.consistency_steps import ERROR, SPREAD, STEPS, closed_form, consistency, exact, flow_map, sampled


def test_consistency_models_get_worse_with_more_steps_and_flow_maps_do_not():
  grows = [abs(closed_form(consistency, n, 1.0)) for n in STEPS]
  shrinks = [abs(closed_form(flow_map, n, 0.0)) for n in STEPS]
  assert (np.diff(grows) > 0).all()
  assert (np.diff(shrinks) < 0).all()
  assert (grows[0], shrinks[0]) == pytest.approx((0.010, 0.010))
  assert (grows[-1], shrinks[-1]) == pytest.approx((0.137, 0.007), abs=5e-4)
  assert closed_form(flow_map, 10_000, 0.0) == pytest.approx(SPREAD ** (1 + ERROR) - SPREAD, rel=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_exact_map_has_no_error(gamma):
  assert closed_form(exact, 16, gamma) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("factor", "gamma"), [(consistency, 1.0), (flow_map, 0.0), (flow_map, 0.5), (flow_map, 1.0)])
def test_sampler_has_the_error_of_the_closed_form(factor, gamma):
  assert sampled(factor, 4, gamma, count=2**15) == pytest.approx(closed_form(factor, 4, gamma), abs=4e-4)

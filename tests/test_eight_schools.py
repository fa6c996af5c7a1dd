# SPDX-License-Identifier: Apache-2.0
"""Both kernels, as a user meets them, on both forms of eight schools against quadrature."""

import eight_schools
import numpy as np
import pytest
from helpers import KERNELS, run_chains

from numpyro_sbtm import report

# kernel, model, warm-up, limits: moments in sds, acceptance, error of the log evidence, found and printed
ROWS = [
    ("dis", eight_schools.noncentred, 1000, 0.1, 0.75, 0.03),
    ("dis", eight_schools.centred, 1000, 0.15, 0.3, 0.1),
    ("sbtm", eight_schools.noncentred, 300, 0.1, 0.0, 0.05),
    ("sbtm", eight_schools.centred, 300, 0.2, 0.0, 0.15),
]


def test_quadrature_has_converged():
    fine, coarse = eight_schools.quadrature(), eight_schools.quadrature(301, 801)
    np.testing.assert_allclose(fine.log_evidence, coarse.log_evidence, atol=1e-5)
    np.testing.assert_allclose(fine.mean, coarse.mean, atol=1e-4)
    np.testing.assert_allclose(fine.sd, coarse.sd, atol=1e-3)
    np.testing.assert_allclose(fine.log_evidence, -31.3114, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, model, num_warmup, moments, acceptance, error", ROWS)
def test_figures_of_eight_schools(kernel, model, num_warmup, moments, acceptance, error):
    exact = eight_schools.quadrature()
    data = eight_schools.Y, eight_schools.SIGMA
    mcmc = run_chains(KERNELS[kernel](model), *data, warmup=num_warmup)
    x = eight_schools.parameters(mcmc.get_samples())
    found = report(mcmc)
    print(f"\n{kernel} {model.__name__}\n{found}")
    assert np.all(np.abs(x.mean(0) - exact.mean) < moments * exact.sd)
    assert np.all(np.abs(x.std(0) - exact.sd) < moments * exact.sd)
    assert abs(found.log_evidence - exact.log_evidence) < error
    assert abs(found.backward_log_evidence - exact.log_evidence) < error
    assert found.log_evidence_se <= error
    # as near as that, the lower bound is of use: a few proposals of no weight do not decide it
    assert exact.log_evidence - 1.0 < found.elbo < exact.log_evidence + 0.01
    assert found.acceptance >= acceptance
    assert found.verdict in ("reliable", "caution")
    assert found.nonfinite_proposals == 0

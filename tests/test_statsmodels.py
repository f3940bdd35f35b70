"""Standard errors against statsmodels, on real data; all in float64 at its own estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

import fvp

sm = pytest.importorskip("statsmodels.api")

COMPILE_QUICKLY = True

# The data sets are small and the models are NumPy programs: statsmodels' warnings are its own.
pytestmark = pytest.mark.filterwarnings("ignore")


def standardised(x):
    return np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])


def breast_cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return standardised(x[:, :8]), y.astype(float)


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return standardised(x), y


def spector():
    data = sm.datasets.spector.load()
    return sm.add_constant(np.asarray(data.exog)), np.asarray(data.endog)


def visits():
    data = sm.datasets.randhie.load()
    return sm.add_constant(np.asarray(data.exog))[::10], np.asarray(data.endog)[::10]


def party():
    data = sm.datasets.anes96.load()
    x = np.asarray(data.exog[["logpopul", "selfLR", "age", "educ", "income"]])
    return standardised(x), np.asarray(data.endog).astype(int)


def example_weights(y):
    return np.random.default_rng(0).integers(1, 4, len(y)).astype(float)


def linear(beta, x):
    return (x @ beta)[:, None]


def probit(beta, x):
    """The logit of the normal distribution function of x.beta."""
    z = x @ beta
    return (jax.scipy.stats.norm.logcdf(z) - jax.scipy.stats.norm.logcdf(-z))[:, None]


def reference_logit(beta, x):
    return jnp.pad(x @ beta, ((0, 0), (1, 0)))


def largest_difference(result, *arguments, errors=None, **options):
    """Relative to the largest standard error of each parameter; statsmodels' errors by column."""
    actual = fvp.standard_errors(*arguments, **options)
    expected = np.asarray(result.bse if errors is None else errors)
    return np.abs(np.asarray(actual) / expected - 1).max()


KINDS = {"expected": "nonrobust", "observed": "nonrobust", "sandwich": "HC0"}
every_kind = pytest.mark.parametrize("kind", KINDS)
weighted = pytest.mark.parametrize("with_weights", [False, True], ids=["equal", "weighted"])


@every_kind
@weighted
@pytest.mark.parametrize(
    ("data", "family", "head"),
    [
        (breast_cancer, "Binomial", fvp.Sigmoid()),
        (spector, "Binomial", fvp.Sigmoid()),
        (visits, "Poisson", fvp.Poisson()),
    ],
    ids=["breast cancer", "spector", "randhie"],
)
def test_generalized_linear_models(data, family, head, kind, with_weights):
    x, y = data()
    weights = example_weights(y) if with_weights else None
    # With freq_weights its sandwich would be of that many independent copies of an example.
    model = sm.GLM(y, x, family=getattr(sm.families, family)(), var_weights=weights)
    result = model.fit(tol=1e-13, maxiter=100, cov_type=KINDS[kind])
    problem = (linear, head, jnp.asarray(result.params), x, y[:, None])
    assert largest_difference(result, *problem, weights=weights, kind=kind) < 1e-6


@every_kind
@weighted
def test_least_squares(kind, with_weights):
    x, y = diabetes()
    weights = example_weights(y) if with_weights else None
    result = sm.WLS(y, x, weights=1.0 if weights is None else weights).fit(cov_type=KINDS[kind])
    head = fvp.Gaussian(scale=np.sqrt(result.scale))
    problem = (linear, head, jnp.asarray(result.params), x, y[:, None])
    assert largest_difference(result, *problem, weights=weights, kind=kind) < 1e-6


@pytest.mark.parametrize("kind", ["expected", "observed"])
def test_a_link_that_is_not_canonical(kind):
    """The expected information of IRLS, and the observed one of maximum likelihood."""
    x, y = spector()
    if kind == "expected":
        family = sm.families.Binomial(link=sm.families.links.Probit())
        result = sm.GLM(y, x, family=family).fit(tol=1e-13, maxiter=100)
    else:
        result = sm.Probit(y, x).fit(method="newton", tol=1e-12, maxiter=100, disp=0)
    problem = (probit, fvp.Sigmoid(), jnp.asarray(result.params), x, y[:, None])
    assert largest_difference(result, *problem, kind=kind) < 1e-6
    other = {"expected": "observed", "observed": "expected"}[kind]
    assert largest_difference(result, *problem, kind=other) > 1e-3


@every_kind
def test_multinomial_logit(kind):
    x, y = party()
    model = sm.MNLogit(y, x)
    result = model.fit(method="newton", tol=1e-12, maxiter=100, disp=0, cov_type=KINDS[kind])
    problem = (reference_logit, fvp.Softmax(), jnp.asarray(result.params), x, y)
    assert largest_difference(result, *problem, kind=kind) < 1e-6


def test_intervals_and_p_values():
    x, y = spector()
    result = sm.Logit(y, x).fit(method="newton", tol=1e-12, maxiter=100, disp=0)
    params = jnp.asarray(result.params)
    errors = fvp.standard_errors(linear, fvp.Sigmoid(), params, x)
    table = fvp.summary(params, errors)
    np.testing.assert_allclose(table.z, result.tvalues, rtol=1e-6)
    np.testing.assert_allclose(table.p_values, result.pvalues, rtol=1e-6)
    ends = np.column_stack([table.lower, table.upper])
    np.testing.assert_allclose(ends, result.conf_int(), rtol=1e-6)

"""Reference vectors: small sequences of calls in float64, against which any library can test its normalization."""

from jaxbn.testing.vectors import Step as Step
from jaxbn.testing.vectors import Vector as Vector
from jaxbn.testing.vectors import load as load
from jaxbn.testing.vectors import names as names

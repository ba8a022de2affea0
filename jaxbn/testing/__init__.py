"""Reference vectors: small sequences of calls in float64, against which any library can test its normalization."""

from jaxbn._src import public as _public
from jaxbn._src.testing.vectors import Step as Step
from jaxbn._src.testing.vectors import Vector as Vector
from jaxbn._src.testing.vectors import load as load
from jaxbn._src.testing.vectors import names as names

_public.set_home(globals())

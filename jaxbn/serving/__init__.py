"""The frozen network on disk, and as a program that answers; arrays from and to other libraries."""

from jaxbn._src import public as _public
from jaxbn._src.interop.match import Match as Match
from jaxbn._src.interop.match import match as match
from jaxbn._src.interop.single_layers import from_equinox as from_equinox
from jaxbn._src.interop.single_layers import from_haiku as from_haiku
from jaxbn._src.interop.single_layers import from_keras as from_keras
from jaxbn._src.interop.single_layers import to_equinox as to_equinox
from jaxbn._src.interop.single_layers import to_haiku as to_haiku
from jaxbn._src.interop.single_layers import to_keras as to_keras
from jaxbn._src.serving.files import load as load
from jaxbn._src.serving.files import save as save
from jaxbn._src.serving.programs import Program as Program
from jaxbn._src.serving.programs import export as export
from jaxbn._src.serving.programs import load_program as load_program
from jaxbn._src.serving.sharded import load_sharded as load_sharded
from jaxbn._src.serving.sharded import save_sharded as save_sharded

_public.set_home(globals())

"""The frozen network on disk, and as a program that answers; arrays from and to other libraries."""

from jaxbn.serving.files import load as load
from jaxbn.serving.files import save as save
from jaxbn.serving.match import Match as Match
from jaxbn.serving.match import match as match
from jaxbn.serving.peers import from_equinox as from_equinox
from jaxbn.serving.peers import from_haiku as from_haiku
from jaxbn.serving.peers import from_keras as from_keras
from jaxbn.serving.peers import to_equinox as to_equinox
from jaxbn.serving.peers import to_haiku as to_haiku
from jaxbn.serving.peers import to_keras as to_keras
from jaxbn.serving.programs import Program as Program
from jaxbn.serving.programs import export as export
from jaxbn.serving.programs import load_program as load_program
from jaxbn.serving.sharded import load_sharded as load_sharded
from jaxbn.serving.sharded import save_sharded as save_sharded

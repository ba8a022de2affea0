"""The frozen network on disk, and as a program that answers."""

from jaxbn.serving.files import load as load
from jaxbn.serving.files import save as save
from jaxbn.serving.match import Match as Match
from jaxbn.serving.match import match as match
from jaxbn.serving.programs import Program as Program
from jaxbn.serving.programs import export as export
from jaxbn.serving.programs import load_program as load_program
from jaxbn.serving.sharded import load_sharded as load_sharded
from jaxbn.serving.sharded import save_sharded as save_sharded

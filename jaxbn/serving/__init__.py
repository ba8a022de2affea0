"""The frozen network on disk."""

from jaxbn.serving.files import load as load
from jaxbn.serving.files import save as save

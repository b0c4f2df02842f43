"""Will this visitor buy?"""

from toy.data import load_data
from toy.model import Model

__all__ = ["Model", "load_data"]
